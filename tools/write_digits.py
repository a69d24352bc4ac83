"""Writes scikit-learn's 1,797 handwritten digits as a folder of JPEGs: ``OUT/{train,test}/<digit>/<number>.jpg``.

They come with scikit-learn, so the demo needs no download.  Each is 8 × 8 pixels of 17 grey levels, enlarged to
32 × 32, so that a random crop has more than a few window positions to choose from.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 32
LEVELS = 16
TEST_SHARE = 0.2


def write_digits(out: Path) -> dict[str, int]:
    """Returns how many images were written to each part; ``out`` appears whole or not at all.

    The last fifth of each class in the data set's own order is the test part.
    """
    digits = load_digits()
    draft = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    counts = {"train": 0, "test": 0}
    for digit in range(10):
        numbers = np.flatnonzero(digits.target == digit)
        first_test = len(numbers) - round(TEST_SHARE * len(numbers))
        for place, number in enumerate(numbers):
            part = "train" if place < first_test else "test"
            folder = draft / part / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.images[number] * (255 / LEVELS)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(folder / f"{number:04d}.jpg", quality=95)
            counts[part] += 1
    draft.rename(out)
    return counts


def main() -> int:
    """Returns 0 once the folder is written, 2 where it exists already."""
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as a folder of JPEGs.")
    parser.add_argument("out", type=Path, help="folder to create")
    out: Path = parser.parse_args().out
    if out.exists():
        print(f"write_digits.py: {out} exists; delete it or name another folder", file=sys.stderr)
        return 2
    counts = write_digits(out)
    print(f"wrote {counts['train']} training and {counts['test']} test images to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

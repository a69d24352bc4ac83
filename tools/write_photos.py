"""Writes photo-like JPEGs of ImageNet's size: crops of 500 × 375 pixels, quality 96, from large photographs.

    python tools/write_photos.py OUT [--count 2000] FOLDER …

Large photographs are found, for example, in Debian's ``mate-backgrounds`` and ``plasma-workspace-wallpapers``.
Files go into ten class folders.  The same photographs give the same files.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY, CLASSES = 500, 375, 96, 10
SMALLEST = 1600
"""Pixels that a photograph has on its longer side, at least."""
LEAST_BYTES = 68_000
"""Crops that take less are sky or plain colour, which ImageNet's images seldom are."""
FOLDERS = ("/usr/share/backgrounds", "/usr/share/wallpapers")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(folder) for folder in FOLDERS])
    options = parser.parse_args()
    paths = sorted(path for folder in options.folders for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    photographs = []
    for path in paths:
        with Image.open(path) as image:
            if max(image.size) >= SMALLEST and min(image.size) > HEIGHT:
                photographs.append(image.convert("RGB"))
    if not photographs:
        print(f"no photographs of {SMALLEST} pixels or more in {', '.join(map(str, options.folders))}", file=sys.stderr)
        return 1
    generator = np.random.default_rng(0)
    written = sizes = 0
    for _ in range(20 * options.count):
        photograph = photographs[generator.integers(len(photographs))]
        left = int(generator.integers(photograph.width - WIDTH + 1))
        top = int(generator.integers(photograph.height - HEIGHT + 1))
        path = options.out / f"class_{written % CLASSES}" / f"{written:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + WIDTH, top + HEIGHT)).save(path, quality=QUALITY)
        if path.stat().st_size < LEAST_BYTES:
            path.unlink()
            continue
        sizes += path.stat().st_size
        written += 1
        if written == options.count:
            break
    print(f"{written} images of {WIDTH} × {HEIGHT}, {sizes / max(written, 1) / 1000:.0f} KB each, in {options.out}")
    return 0 if written == options.count else 1


if __name__ == "__main__":
    sys.exit(main())

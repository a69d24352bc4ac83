"""FFCV's loader in a process of its own: a line of JSON in, the path of an ``.npz`` out.

In the tests' process its compiled functions would be collected in the midst of later tests, which numba does not always
survive.
"""

import json
import sys
import warnings
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption

SIDE = 32


def load(path: str, *, decoder: str, os_cache: bool, order: str) -> dict[str, Any]:
    """Returns pixels and labels of all samples, in the loader's order."""
    decoders = {
        "simple": lambda: SimpleRGBImageDecoder(),
        "center": lambda: CenterCropRGBImageDecoder((SIDE, SIDE), 1),
        # In an image that is not square, no square of its area fits, and the middle one is taken.
        "random": lambda: RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=(1, 1), ratio=(1, 1)),
    }
    loader = Loader(
        path, batch_size=16, num_workers=1, os_cache=os_cache, order=OrderOption[order], seed=1, drop_last=False,
        pipelines={"image": [decoders[decoder]()]},
    )  # fmt: skip
    batches = [(np.array(images), np.array(labels)) for images, labels in loader]
    return {name: np.concatenate([batch[at] for batch in batches]) for name, at in (("pixels", 0), ("labels", 1))}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        out = request.pop("out")
        np.savez(out, **load(**request))
        print(out, flush=True)

"""Ways to embed patches, forward and backward: ``python benchmarks/patch_embedding.py``.

Ours is one matrix product over patches that are cut, cutting included; timm's ``PatchEmbed`` is a convolution; stacked,
patches are cut and convolved as one narrow image, which does for a part of them as well.  One thread, medians of rounds
in turns, printed as Markdown with the largest error of the tokens against float64, in units of their standard
deviation.  Before each round, memory is filled with NaN and given back.
"""

import statistics
import time
from collections.abc import Callable

import torch
from timm.layers import PatchEmbed
from torch import Tensor

from maestri.model.encoder import PatchProjection, to_patches

ROUNDS = 7
SHAPES = ((128, 28, 7, 128), (64, 96, 16, 384), (16, 224, 16, 768))
"""Images, their side, the patch's, the width of a token."""


def poison() -> None:
    """Leaves NaN in memory that is free."""
    for exponent in range(8, 23):
        torch.full((2**exponent,), torch.nan)


def measured(run: Callable[[], Tensor], gradient: Tensor) -> float:
    """Returns seconds."""
    poison()
    began = time.perf_counter()
    run().backward(gradient)
    return time.perf_counter() - began


def row(batch: int, side: int, patch: int, dim: int, dtype: torch.dtype) -> str:
    """Returns a row of the table."""
    torch.manual_seed(0)
    theirs = PatchEmbed(side, patch, embed_dim=dim)
    pixels = torch.randn(batch, 3, side, side)
    with torch.no_grad():
        exact = theirs.double()(pixels.double())
    theirs.to(dtype)
    ours, images = PatchProjection.of(theirs.proj), pixels.to(dtype)
    runs = {
        "ours": lambda: ours(to_patches(images, patch)),
        "timm": lambda: theirs(images),
        "stacked": lambda: theirs.proj(to_patches(images, patch).transpose(1, 2).flatten(2, 3)).flatten(2).mT,
    }
    gradient = torch.randn(exact.shape).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors = dict.fromkeys(runs, 0.0)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            seconds[name].append(measured(run, gradient))
            poison()
            with torch.no_grad():
                error = ((run().double() - exact).abs().max() / exact.std()).nan_to_num(float("inf"))
            errors[name] = max(errors[name], float(error))
    ms = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    return (
        f"| {batch} × {side} × {side} | {patch} | {dim} | {str(dtype).removeprefix('torch.')} | {ms['ours']:.2f} |"
        f" {ms['timm']:.2f} | {ms['stacked']:.2f} |"
        f" {errors['ours']:.1g} | {errors['timm']:.1g} | {errors['stacked']:.1g} |"
    )


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print("| images | patch | width | dtype | ours, ms | timm, ms | stacked, ms | error, ours | timm | stacked |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            print(row(*shape, dtype), flush=True)


if __name__ == "__main__":
    main()

"""Corruption: blocks of a view filled with black, noise or another image, beside the clean view (GMML).

Group masked model learning (Atito et al., "SiT", arXiv 2104.03602, and "GMML is all you need", arXiv 2205.14986) hides
groups of connected tokens by corrupting their pixels; the tokens stay in the sequence.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil, floor, isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maestri.pipelines.blocks import cover
from maestri.pipelines.counter_rng import Purpose, as_integer_below, as_uniform, random_words

ZEROS, NOISE, OTHER = 0, 1, 2
"""What fills a view's blocks: black, noise, or the same place of the partner's view."""
LARGEST_NOISY_SIZE = 1024
"""Height and width up to which views can hold noise, in pixels: as much as the bank has room for."""
_NUM_STARTS = 1 << 20
_NOISE_SEED = 0x6E6F697365


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionConfig:
    """How much of a view is corrupted, and with what."""

    coverage: float = 0.0
    """Fraction of a view that blocks cover at least; 0: views stay clean, and there is no corrupted twin."""
    block: tuple[float, float] = (0.05, 0.3)
    """Smallest and largest side of a block, as a fraction of the view's."""
    align: bool = True
    """Whether blocks consist of whole tokens; otherwise their sides fall on any pixel."""
    other: float = 0.5
    """Probability that a view's blocks show another image: the partner's view, of position XOR 1."""
    other_coverage: float = 0.3
    """``coverage`` of views whose blocks show another image."""
    noise: float = 0.0
    """Probability that a view's blocks hold noise; the rest are black."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        checks = (
            ("coverage", 0 <= self.coverage < 1, "0 ≤ coverage < 1, a fraction of the area"),
            ("block", 0 < self.block[0] <= self.block[1] <= 1, "0 < smallest ≤ largest ≤ 1, fractions of a side"),
            ("other", 0 <= self.other <= 1, "a probability, 0 to 1"),
            ("other_coverage", 0 < self.other_coverage < 1, "0 < coverage < 1, a fraction of the area"),
            ("noise", 0 <= self.noise <= 1 and self.noise + self.other <= 1, "a probability, with other at most 1"),
        )
        for name, passed, expected in checks:
            if not passed:
                raise ValueError(f"views.corruption.{name} is {getattr(self, name)}; expected {expected}")

    @property
    def corrupts(self) -> bool:
        """Whether views get a corrupted twin."""
        return self.coverage > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionPlan:
    """What is corrupted of each view; where blocks are whole tokens, they are those of the group's token mask."""

    fill: NDArray[np.uint8]
    """``view batch``: ``ZEROS``, ``NOISE`` or ``OTHER``."""
    noise_start: NDArray[np.int64]
    """``view batch``: where in the bank a view's noise begins, in bytes."""
    pixels: NDArray[np.bool_] | None
    """``view batch height width``: True = corrupted; None where blocks are whole tokens."""


def plan_corruption(
    config: CorruptionConfig,
    *,
    seed: int,
    positions: NDArray[np.int64],
    views: NDArray[np.int64],
    grid: int,
    patch: int,
) -> tuple[NDArray[np.bool_], CorruptionPlan]:
    """Returns the token mask, bool ``view batch token`` (True = a pixel of it is corrupted), and the plan.

    Blocks have sides uniform in ``block`` and lie anywhere within the view; they are added until the coverage is
    reached, so it is exceeded by less than one block.  What 256 blocks don't cover is covered in reading order from a
    random place on, up to exactly the coverage.  Draw 0 of the generator has the words fill, start of the noise, that
    place; block k uses draw k + 1, its words in the order height, width, top, left.

    Args:
        config: how views are corrupted.
        seed: the run's seed.
        positions: global positions, ``batch``.
        views: numbers of the views, ``view 1``.
        grid: tokens along a side.
        patch: side of a token in pixels.

    Raises:
        ValueError: views are too large for the bank of noise.
    """
    if config.noise > 0 and grid * patch > LARGEST_NOISY_SIZE:
        raise ValueError(f"views.size is {grid * patch} with noise; expected at most {LARGEST_NOISY_SIZE} pixels")
    shape = np.broadcast_shapes(positions.shape, views.shape)
    words = random_words(seed, positions, views, Purpose.CORRUPTION)[..., 0, :]
    uniform = as_uniform(words[..., 0])
    fill = np.where(uniform < config.other, OTHER, np.where(uniform < config.other + config.noise, NOISE, ZEROS))
    side = grid if config.align else grid * patch
    # The small number keeps e.g. 0.29 · 100 = 28.999999999999996 and 0.07 · 100 = 7.000000000000001 what they mean.
    shortest = max(ceil(config.block[0] * side - 1e-9), 1)
    longest = max(floor(config.block[1] * side + 1e-9), shortest)
    needed, needed_other = (ceil(share * side * side - 1e-9) for share in (config.coverage, config.other_coverage))
    where, which = (np.broadcast_to(values, shape).ravel() for values in (positions, views))

    def words_of(some: NDArray[np.int64], first: int, count: int) -> NDArray[np.uint32]:
        return random_words(seed, where[some], which[some], Purpose.CORRUPTION, num_draws=count, first_draw=first + 1)

    cells = cover(
        words_of,
        np.where(fill == OTHER, needed_other, needed).ravel(),
        as_integer_below(words[..., 2], np.array(side * side)).ravel(),
        sides=(shortest, longest),
        side=side,
    )
    pixels = None if config.align else cells.reshape(*shape, side, side)
    if not config.align:
        in_rows = np.logical_or.reduce(cells.reshape(-1, grid, patch, side), axis=2)
        cells = np.logical_or.reduce(in_rows.reshape(-1, grid, grid, patch), axis=3)
    noise_start = as_integer_below(words[..., 1], np.array(_NUM_STARTS))
    plan = CorruptionPlan(fill=fill.astype(np.uint8), noise_start=noise_start, pixels=pixels)
    return cells.reshape(*shape, grid * grid), plan


@cache
def _noise() -> NDArray[np.uint8]:
    """Returns the bank of noise: uniform bytes, the same in every run; a view's noise is a stretch of it."""
    num_bytes = _NUM_STARTS + 3 * LARGEST_NOISY_SIZE**2
    words = random_words(_NOISE_SEED, np.arange(num_bytes // 16), 0, Purpose.CORRUPTION)
    return np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(-1)


@cache
def _noise_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_noise()).to(device)


def corrupt(views: Tensor, plan: CorruptionPlan, token_mask: NDArray[np.bool_]) -> Tensor:
    """Returns the corrupted twin of a batch of views, of the same bytes as ``corrupt_into``'s; waits for no GPU.

    Args:
        views: clean views on any device, uint8 ``view batch 3 height width``, channels-last in memory, as is the twin.
        plan: what fills the blocks.
        token_mask: ``view batch token``, as planned with it.

    Raises:
        ValueError: the batch is odd, so a sample has no partner.
    """
    count, batch = views.shape[:2]
    if batch % 2:
        raise ValueError(f"a batch has {batch} samples; expected an even number, so that each has a partner")
    nhwc = views.permute(0, 1, 3, 4, 2).contiguous()
    if views.device.type == "cpu":  # a tenth of the time of ``_corrupt_at_once``
        clean, twin = nhwc.numpy(), torch.empty_like(nhwc)
        for view, sample in np.ndindex(count, batch):
            into = twin[view, sample].numpy()
            corrupt_into(into, clean[view, sample], clean[view, sample ^ 1], plan, token_mask, view=view, sample=sample)
        return twin.permute(0, 1, 4, 2, 3)
    return _corrupt_at_once(nhwc, plan, token_mask).permute(0, 1, 4, 2, 3)


def _corrupt_at_once(views: Tensor, plan: CorruptionPlan, token_mask: NDArray[np.bool_]) -> Tensor:
    """Returns what ``corrupt`` does, of and as ``view batch height width 3``, by few operations on all views."""
    device, size = views.device, views.shape[2]
    clean = views.view(-1, size * size * 3)
    filled = torch.zeros_like(clean)
    if (others := np.flatnonzero(plan.fill == OTHER)).size:
        filled.index_copy_(0, _on(others, device), clean.index_select(0, _on(others ^ 1, device)))
    if (noisy := np.flatnonzero(plan.fill == NOISE)).size:
        stretches = _noise_on(device).as_strided((_NUM_STARTS, clean.shape[1]), (1, 1))
        noise = stretches.index_select(0, _on(plan.noise_start.reshape(-1)[noisy], device))
        filled.index_copy_(0, _on(noisy, device), noise)
    shape: tuple[int, ...] = (-1, size * size, 3)
    if plan.pixels is None:
        grid = isqrt(token_mask.shape[-1])
        mask = _on(token_mask, device).reshape(-1, grid, 1, grid, 1)
        shape = (-1, grid, size // grid, grid, size // grid * 3)
    else:
        mask = _on(plan.pixels, device).reshape(-1, size * size, 1)
    return torch.where(mask, filled.view(shape), clean.view(shape)).view(views.shape)


def _on(array: NDArray[Any], device: torch.device) -> Tensor:
    """Returns the array as a tensor on the device; to a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def corrupt_into(
    out: NDArray[np.uint8],
    clean: NDArray[np.uint8],
    partner: NDArray[np.uint8] | None,
    plan: CorruptionPlan,
    token_mask: NDArray[np.bool_],
    *,
    view: int,
    sample: int,
) -> None:
    """Writes the corrupted twin of one view of one sample; the same bytes as ``corrupt``.

    Args:
        out: where it is written, uint8 ``height width 3``, contiguous.
        clean: the clean view, like ``out``.
        partner: the same view of sample XOR 1, clean too; only needed where ``plan.fill[view, sample]`` is ``OTHER``.
        plan: of the whole batch.
        token_mask: ``view batch token``, as planned with it.
        view: number of the view in the plan.
        sample: number of the sample in the batch.

    Raises:
        ValueError: a partner is needed, and there is none.
    """
    assert out.flags.c_contiguous
    fill = plan.fill[view, sample]
    if fill == OTHER:
        if partner is None:
            raise ValueError(f"sample {sample} of the batch has no partner; expected an even number of samples")
        filled = partner
    elif fill == NOISE:
        start = plan.noise_start[view, sample]
        filled = _noise()[start : start + clean.size].reshape(clean.shape)
    else:
        filled = np.zeros_like(clean)
    if plan.pixels is None:
        # A token's row of pixels is copied as one item: half the time of a mask over bytes.
        grid, row = isqrt(token_mask.shape[-1]), clean.shape[1] * 3
        whole, source = (pixels.reshape(grid, -1, row).view(f"V{row // grid}") for pixels in (out, filled))
        np.copyto(out, clean)
        np.copyto(whole, source, where=token_mask[view, sample].reshape(grid, 1, grid))
    else:
        chosen, levels = np.empty_like(clean), plan.pixels[view, sample].view(np.uint8) * np.uint8(255)
        for channel in range(3):  # four times as fast as all at once
            chosen[..., channel] = levels
        np.bitwise_xor(clean, filled, out=out)
        out &= chosen
        out ^= clean

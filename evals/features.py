"""Frozen features of images from shards, through the data path that training uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from maestri.evals.sharing import agreeing, place
from maestri.pipelines.evaluation import evaluation_batches
from maestri.shards.shard_set import ShardSet

RAW_PIXEL_SIDE = 32
"""Larger images are averaged down to this side before raw pixels are compared."""

Extractor = Callable[[Tensor], Mapping[str, Tensor]]
"""uint8 ``batch 3 height width`` → features by pooling, ``batch dim``."""

Table = Mapping[str, Tensor]
"""Features of one model: pooling → ``sample dim``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A model whose features are judged."""

    extract: Extractor
    """Its features."""
    identity: Mapping[str, Any]
    """What they depend on besides the images, as JSON stores it: a digest of its weights, and what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSettings:
    """How evaluation images are made."""

    size: int
    """Height and width in pixels."""
    crop_fraction: float
    """Side of the centre crop as a fraction of the shorter side."""
    batch_size: int
    """Images per forward pass, on each rank."""
    num_threads: int
    """CPU threads that decode."""
    device: torch.device
    """Where features are computed."""
    executor: Literal["auto", "dali", "threads"] = "auto"
    """What decodes: the run's ``data.executor``."""

    @property
    def dtype(self) -> torch.dtype:
        """What features are kept in: ImageNet's take 2 GB per model and pooling in half precision on a GPU."""
        return torch.float16 if self.device.type == "cuda" else torch.float32


def encoder_extractor(encoder: torch.nn.Module) -> Extractor:
    """Returns features of a ViT: ``cls``, the class token, and ``mean``, the mean of patch tokens, after the norm."""

    def extract(images: Tensor) -> dict[str, Tensor]:
        tokens = encoder(images)
        return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}

    return extract


def raw_pixels(images: Tensor) -> dict[str, Tensor]:
    """Returns ``raw``: the pixels themselves, averaged down to at most 32 × 32."""
    pixels = images.float()
    if images.shape[-1] > RAW_PIXEL_SIDE:
        pixels = F.interpolate(pixels, size=RAW_PIXEL_SIDE, mode="area")
    return {"raw": pixels.flatten(1)}


def extract_features(
    extractors: Mapping[str, Extractor], shard_set: ShardSet, rows: NDArray[np.int64], settings: ImageSettings
) -> dict[str, dict[str, Tensor]]:
    """Returns ``features[name][pooling]``, ``sample dim``, float32 (float16 on a GPU), as rows stand.

    Images are read once for all extractors.  Every rank must call it: each takes a share of the rows, as many batches
    as the others (under ZeRO 3 a forward pass is a collective), and all get the whole result, on the device.
    """
    rank, world = place()
    share = -(-len(rows) // world)
    padded = np.resize(rows, share * world)  # the first rows again; cut off below
    parts: dict[tuple[str, str], list[Tensor]] = {}
    with agreeing():
        parts = _own_features(extractors, shard_set, padded[rank * share : (rank + 1) * share], settings)
    features: dict[str, dict[str, Tensor]] = {}
    for name, pooling in list(parts):
        pieces = parts.pop((name, pooling))
        features.setdefault(name, {})[pooling] = _gathered(torch.cat(pieces), world)[: len(rows)]
    return features


@torch.no_grad()
def _own_features(
    extractors: Mapping[str, Extractor], shard_set: ShardSet, rows: NDArray[np.int64], settings: ImageSettings
) -> dict[tuple[str, str], list[Tensor]]:
    """Returns batches of features of this rank's rows by model and pooling."""
    parts: dict[tuple[str, str], list[Tensor]] = {}
    batches = evaluation_batches(
        shard_set,
        rows,
        size=settings.size,
        crop_fraction=settings.crop_fraction,
        batch_size=settings.batch_size,
        device=settings.device,
        num_threads=settings.num_threads,
        executor=settings.executor,
    )
    for images, _ in batches:
        for name, extract in extractors.items():
            for pooling, values in extract(images).items():
                parts.setdefault((name, pooling), []).append(values.to(settings.dtype))
    return parts


def _gathered(local: Tensor, world: int) -> Tensor:
    if world == 1:
        return local
    whole = local.new_empty((world * len(local), *local.shape[1:]))
    dist.all_gather_into_tensor(whole, local.contiguous())
    return whole

"""``maestri shards repack``."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maestri.shards.byte_size import ByteSize
from maestri.shards.commands.convert import convert_opened
from maestri.shards.commands.terminal import Json
from maestri.shards.convert import ConvertConfig
from maestri.shards.manifest import Manifest
from maestri.shards.sources.shard_set import ShardSetSource


@dataclass(frozen=True, kw_only=True, slots=True)
class RepackConfig:
    """Settings of ``repack``."""

    format: Literal["tar", "beton", "both"] = "tar"
    """What the new shards are; both go into OUT/tar and OUT/beton."""
    shard_bytes: ByteSize = 256 * 2**20
    """Bytes of images that go into a shard, about; also as 500MB or 1GiB."""
    shard_samples: int = 0
    """Images that go into a shard, instead of --shard-bytes; 0 for by bytes."""
    seed: int = -1
    """Of a new global shuffle; -1 keeps the order of rows."""
    check: Literal["decode", "header"] = "header"
    """``decode`` also decodes every image; its CRC-32 is compared in any case."""
    bad: Literal["quarantine", "fail"] = "quarantine"
    """An image that is damaged in SET is left out and listed, or ends the command."""
    classes: Path | None = None
    """Number classes as this set of shards does, or as this text file lists them, a name a line."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that read and write; by default one for each core."""
    check_space: bool = True
    """Stop at the start if the disk will not hold the set."""


def repack(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SET")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    config: Annotated[RepackConfig, tyro.conf.arg(name="")] = RepackConfig(),  # noqa: B008  # frozen
    as_json: Json = False,
) -> int:
    """Pack a set into other shards: another format, size or order, with the stored images byte for byte.

    The one exception: FFCV reads no PNG, so the PNGs of a --lossless set become JPEGs of quality 100 in a .beton.

    Keys, labels, class names, orientations and what was done to each image are kept; rows keep their order unless a
    --seed is given.  SET is only read, and may be one that `maestri shards index` made.  Images whose bytes are no
    longer those that were stored are left out and listed in OUT/quarantine.jsonl: this is also how to save what is
    left of a damaged set.

    Interrupted at any moment, the same command finishes the job, to the same bytes.

    For example:
      maestri shards repack /shards/imagenet /shards/imagenet-beton --format beton
      maestri shards repack /shards/tiny /shards/tiny-few --shard-bytes 1GiB

    Args:
        folder: The set.
        out: Folder for the new one.
        config: Settings.
        as_json: Print the new manifest as JSON, or those of several formats.
    """
    has_png = "PNG, byte for byte" in Manifest.read(folder).images.get("kept", "")
    settings = ConvertConfig(
        format=config.format, shard_bytes=config.shard_bytes, shard_samples=config.shard_samples, seed=config.seed,
        check=config.check, bad=config.bad, classes=config.classes, workers=config.workers,
        check_space=config.check_space, lossless=has_png and config.format == "tar",
    )  # fmt: skip
    return convert_opened(ShardSetSource(folder), out, settings, as_json=as_json)

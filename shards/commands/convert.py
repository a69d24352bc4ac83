"""``maestri shards convert``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from maestri.shards import convert as conversion
from maestri.shards.classes import class_names_of, common
from maestri.shards.commands.terminal import Json, facts, print_json, print_set, progress_bar, say
from maestri.shards.convert import ConvertConfig
from maestri.shards.errors import ShardError
from maestri.shards.finish import QUARANTINE_LIST
from maestri.shards.manifest import Manifest
from maestri.shards.parallel import Progress
from maestri.shards.sources import Source


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    config: Annotated[ConvertConfig, tyro.conf.arg(name="")] = ConvertConfig(),  # noqa: B008  # frozen
    as_json: Json = False,
) -> int:
    """Convert a data set into shards, once, for every training run after.

    SOURCE is a folder of images (one folder per class, or flat), an idx3 file such as train-images-idx3-ubyte.gz with
    its labels file beside it, a folder of such files, WebDataset tars (a folder, or a pattern like
    'train-{000..146}.tar'), ImageNet's own tars, parquet files, a .beton, or a set of shards.

    OUT becomes a set: shards (plain WebDataset tars with DALI's .idx beside each, or FFCV's .beton), index.bin,
    quarantine.jsonl, and manifest.json last.  8-bit grey and YCbCr JPEGs keep their bytes; everything else becomes a
    JPEG.  Images that cannot be read are left out, listed in quarantine.jsonl with the reason, and their bytes kept in
    OUT/quarantine.  The source is only read.

    Interrupted at any moment, the same command finishes the job, to the same bytes.

    Several splits make several sets with one list of classes: --split train,val writes OUT/train and OUT/val.

    For example:
      maestri shards convert /data/imagenet/train /shards/imagenet
      maestri shards convert /data/imagenet /shards/imagenet --split train,val --format both

    Args:
        source: What to convert.
        out: Folder for the set.
        config: Settings.
        as_json: Print the result as JSON: a manifest, or several by format or split.
    """
    if "," not in config.split:
        return convert_opened(conversion.opened(source, config), out, config, as_json=as_json)
    return _show(_convert_splits(source, out, config), config, as_json=as_json)


def convert_opened(source: Source, out: Path, config: ConvertConfig, *, as_json: bool) -> int:
    """Converts an opened source, shows what came of it, and returns the exit code."""
    return _show({out: _convert_one(source, out, config, None)}, config, as_json=as_json)


def _show(found: dict[Path, dict[str, Manifest]], config: ConvertConfig, *, as_json: bool) -> int:
    if as_json:
        print_json(_as_json(found))
        return 0
    for folder, manifests in found.items():
        if config.part:
            _say_next(folder, config)
        for form, manifest in manifests.items():
            at = folder / form if len(manifests) > 1 else folder
            if manifest.num_quarantined:
                say(f"{manifest.num_quarantined:,} images could not be read: see {at / QUARANTINE_LIST}", error=True)
            print_set(at, manifest)
    return 0


def _convert_splits(source: Path, out: Path, config: ConvertConfig) -> dict[Path, dict[str, Manifest]]:
    """Converts several splits of a source; their classes are numbered alike."""
    splits = [split.strip() for split in config.split.split(",")]
    if "" in splits or len(set(splits)) < len(splits) or any(Path(split).name != split for split in splits):
        raise ShardError(f"--split is '{config.split}'; expected one name, or several different ones like train,val")
    if config.labels is not None:
        raise ShardError("--labels is for one split; convert each by its own command, with --classes")
    opened = {split: conversion.opened(source, replace(config, split=split)) for split in splits}
    if config.classes:
        class_names = class_names_of(config.classes)
    else:
        class_names = common([_class_names_of(one) for one in opened.values()])
    return {
        out / split: _convert_one(one, out / split, replace(config, split=split), class_names or None)
        for split, one in opened.items()
    }


def _class_names_of(source: Source) -> tuple[str, ...]:
    early = getattr(source, "class_names", None)
    found: tuple[str, ...] = early() if early is not None else source.listing().class_names
    return found


def _convert_one(
    source: Source, out: Path, config: ConvertConfig, class_names: tuple[str, ...] | None
) -> dict[str, Manifest]:
    what = f"converting {config.split}".rstrip()
    with progress_bar(Console(stderr=True), what) as update:

        def report(at: Progress) -> None:
            update(
                completed=at.images, total=at.total_images, images=at.images, total_images=at.total_images,
                bytes=at.bytes, bad=at.bad, resumed=at.resumed_images,
            )  # fmt: skip

        return conversion.convert_source(source, out, config, report=report, class_names=class_names)


def _say_next(out: Path, config: ConvertConfig) -> None:
    count = config.part_of()[1]
    say(f"part {config.part} is done; when all {count} are: maestri shards merge {out}")
    say(f"(if they were written into different folders: maestri shards merge OUT PART1 … PART{count})")


def _as_json(found: dict[Path, dict[str, Manifest]]) -> object:
    """Returns a manifest; several by format; those of several splits by split."""
    each: dict[str, object] = {}
    for folder, manifests in found.items():
        plain = {form: facts(manifest) for form, manifest in manifests.items()}
        each[folder.name] = next(iter(plain.values())) if len(plain) == 1 else plain  # of a part, nothing yet
    return next(iter(each.values())) if len(each) == 1 else each

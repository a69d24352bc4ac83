"""A source turned into a set of shards: in parallel, exactly, and resumable after any interruption.

A shard is a fixed range of the shuffled source, so its bytes depend neither on the number of workers nor on where an
earlier attempt stopped.  Finished shards are kept; the manifest is written last and makes the set whole.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from maestri.shards import worker
from maestri.shards.ahead import Checks, Remainder
from maestri.shards.byte_size import ByteSize
from maestri.shards.classes import class_names_of
from maestri.shards.disk_space import require_space
from maestri.shards.encoders import encoders
from maestri.shards.errors import ShardError
from maestri.shards.finish import finish
from maestri.shards.journal import Journal
from maestri.shards.listing import Listing
from maestri.shards.manifest import Manifest
from maestri.shards.parallel import (
    Progress,
    Report,
    Spare,
    in_processes,
    nothing,
    prepare_workers,
    silent,
    worker_context,
)
from maestri.shards.plan import cut, cut_by_count, in_order, recipe_of, shuffled
from maestri.shards.shard_set import ShardSet
from maestri.shards.sources import Source, open_source
from maestri.shards.worker import Counters, Storing, Task

_BOUNDS = {
    "workers": (1, 1024),
    "shard_bytes": (1, 2**62),
    "shard_samples": (0, 2**40),
    "seed": (-1, 2**63 - 1),
    "resize_shorter": (0, 65500),
    "quality": (1, 100),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Settings of a conversion; all but ``workers``, ``part`` and ``check_space`` decide the shards' bytes."""

    format: Literal["tar", "beton", "both"] = "tar"
    """What shards are: plain WebDataset tars, FFCV .beton files, or both in one pass, into OUT/tar and OUT/beton."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that read, check and write; by default one for each core."""
    part: str = ""
    """Such as 3/8: convert only the third of eight parts, on one of eight machines that share OUT; then merge."""
    split: str = ""
    """Of SOURCE, where it has several: a subfolder, or a file's first word (test finds t10k); train,val makes both."""
    labels: Path | None = None
    """File with the images' labels, where SOURCE has none: image and class (or classes) in each line."""
    classes: Path | None = None
    """Number classes as this set of shards does, or as this text file lists them, a name a line."""
    image: str = ""
    """Which tar member (such as jpg), parquet column or beton field holds the image, where it is not obvious."""
    label: str = ""
    """Which tar member or json key, parquet column or beton field holds the label, where it is not obvious."""
    shard_bytes: ByteSize = 256 * 2**20
    """Bytes of the source that go into a shard, about; also as 500MB or 1GiB."""
    shard_samples: int = 0
    """Images that go into a shard, instead of --shard-bytes; 0 for by bytes."""
    seed: int = 0
    """Of the global shuffle; -1 for the source's own order."""
    check: Literal["decode", "header"] = "decode"
    """``decode`` decodes every image once, which a GPU decoder needs; ``header`` only parses the header."""
    bad: Literal["quarantine", "fail", "fix"] = "quarantine"
    """A bad image is left out and kept aside, ends the conversion, or is encoded again as far as it can be decoded."""
    lossless: bool = False
    """Keep PNG files as they are, and store as PNG what would otherwise become a JPEG (tar only)."""
    resize_shorter: int = 0
    """Pixels to which the shorter side is reduced; 0 for no change."""
    quality: int = 100
    """Of JPEGs that have to be encoded, 1-100."""
    check_space: bool = True
    """Stop at the start if the disk will not hold the set."""

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                flag = f"--{name.replace('_', '-')}"
                raise ShardError(f"{flag} is {getattr(self, name)}; expected a number from {least} to {most}")
        if self.lossless and self.format != "tar":
            raise ShardError(f"--lossless is for --format tar, and not {self.format}: FFCV reads no PNG")
        if self.part:
            self.part_of()

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to write."""
        return ("tar", "beton") if self.format == "both" else (self.format,)

    def part_of(self) -> tuple[int, int]:
        """Returns which part this is, from 0, and of how many.

        Raises:
            ShardError: it is not like 3/8.
        """
        if not self.part:
            return 0, 1
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ShardError(f"--part is '{self.part}'; expected something from 1/8 to 8/8")
        return int(match[1]) - 1, int(match[2])


def convert(source_path: Path, out: Path, config: ConvertConfig, *, report: Report = silent) -> dict[str, Manifest]:
    """Converts a source and returns the manifest of the set in each format; of a part, none.

    Args:
        source_path: what ``open_source`` takes.
        out: the set's folder; made if it is missing.  One left by the same command that was interrupted is finished.
        config: the settings.
        report: called about five times a second.

    Raises:
        ShardError: the source cannot be converted, ``out`` holds something else, no image is readable, an image is bad
            and none may be, the disk is full, or a worker died; what is finished stays.
    """
    return convert_source(opened(source_path, config), out, config, report=report)


def opened(source_path: Path, config: ConvertConfig) -> Source:
    """Returns the source at a path, opened as the settings say.

    Raises:
        ShardError: it cannot be opened.
    """
    class_names = class_names_of(config.classes) if config.classes else ()
    return open_source(
        source_path,
        split=config.split,
        labels=config.labels,
        image=config.image,
        label=config.label,
        class_names=class_names,
    )


def convert_source(
    source: Source,
    out: Path,
    config: ConvertConfig,
    *,
    report: Report = silent,
    class_names: tuple[str, ...] | None = None,
) -> dict[str, Manifest]:
    """Converts an opened source; see ``convert``.

    Args:
        source: the source.
        out: the set's folder.
        config: the settings; ``split``, ``labels``, ``image`` and ``label`` were used to open the source.
        report: called about five times a second.
        class_names: how classes are numbered, instead of the source's own numbers or ``config.classes``.
    """
    if any(out.resolve().is_relative_to(path.resolve()) for path in (source.path, *source.files)):
        raise ShardError(f"{out} lies inside the source {source.path}; choose a folder outside of it")
    try:
        with Journal(out, config.formats, part=config.part) as journal:
            if not journal.is_whole():
                prepare_workers()
            _stage(source, journal, config)
            listing = source.listing()
            wanted = class_names or (class_names_of(config.classes) if config.classes else None)
            if wanted is not None:
                listing = _with_classes(listing, wanted)
            plan = _Plan(listing, config)
            if not journal.head and not journal.is_whole() and _minds_space(config):  # other settings may yet do
                require_space(out, plan.num_bytes_of(_mine(plan, config)) * len(config.formats))
            if journal.claim(_head(source, listing, plan, config)):
                return _whole(journal)
            _write_shards(source, journal, plan, config, report)
            if config.part:
                journal.drop_staged()
                return {}
            return finish(journal)
    except OSError as error:
        at = error.filename or out
        raise ShardError(f"{error.strerror or error}: {at}; once that is mended, the same command continues") from None


def _stage(source: Source, journal: Journal, config: ConvertConfig) -> None:
    """Lays the images of a source that cannot be read at random out in the journal."""
    stage = getattr(source, "stage", None)
    if stage is None:
        return
    journal.staged.mkdir(exist_ok=True)
    to_stage = getattr(source, "bytes_to_stage", None)
    size = to_stage(journal.staged) if config.check_space and to_stage is not None else 0
    if size and _minds_space(config) and not journal.head and not journal.is_whole():  # the shards come on top
        size += sum(file.stat().st_size for file in source.files) * len(config.formats) // config.part_of()[1]
    require_space(journal.out, size)
    stage(journal.staged)


def _minds_space(config: ConvertConfig) -> bool:
    return config.check_space and not config.resize_shorter


def _with_classes(listing: Listing, class_names: tuple[str, ...]) -> Listing:
    """Returns the listing with classes numbered by another list; one without labels gets no classes."""
    found = listing.with_classes(class_names)
    has_labels = bool((found.labels >= 0).any()) or found.label_ends is not None
    return found if has_labels else replace(found, class_names=())


class _Plan:
    """Which sample goes into which shard."""

    def __init__(self, listing: Listing, config: ConvertConfig) -> None:
        self.listing = listing
        self.order = in_order(len(listing)) if config.seed < 0 else shuffled(len(listing), config.seed)
        if config.shard_samples:
            self.bounds = cut_by_count(len(listing), config.shard_samples)
        else:
            self.bounds = cut(listing.sizes[self.order], config.shard_bytes)

    @property
    def num_shards(self) -> int:
        return len(self.bounds) - 1

    def name(self, number: int) -> str:
        return f"shard-{number:0{max(5, len(str(self.num_shards)))}d}"

    def num_samples(self, number: int) -> int:
        return int(self.bounds[number + 1] - self.bounds[number])

    def num_bytes(self, number: int) -> int:
        return int(self.listing.sizes[self.order[self.bounds[number] : self.bounds[number + 1]]].sum())

    def num_bytes_of(self, numbers: Sequence[int]) -> int:
        return sum(self.num_bytes(number) for number in numbers)

    def samples(self, number: int, first: int, last: int) -> Listing:
        """Returns some of a shard's samples, from one of them to before another."""
        start = self.bounds[number]
        return self.listing.take(self.order[start + first : start + last])

    def task(self, number: int) -> Task:
        samples = self.samples(number, 0, self.num_samples(number))
        return Task(name=self.name(number), number=number, first_sample=int(self.bounds[number]), samples=samples)


def _mine(plan: _Plan, config: ConvertConfig) -> range:
    """Returns the numbers of the shards that this part is to write."""
    part, num_parts = config.part_of()
    return range(part, plan.num_shards, num_parts)


def _head(source: Source, listing: Listing, plan: _Plan, config: ConvertConfig) -> dict[str, Any]:
    """Returns what the journal keeps of a conversion; ``manifest`` holds fields of the set's."""
    storing = asdict(_storing(config))
    if storing["bad"] != "fix":
        del storing["bad"]  # decides no bytes
    settings: dict[str, Any] = {
        "shard_bytes": config.shard_bytes,
        "shard_samples": config.shard_samples,
        "seed": config.seed,
    }
    settings |= {"version": 2, "kind": source.kind, "formats": config.formats, **storing}
    several = listing.label_ends is not None
    return {
        "recipe": recipe_of(listing.digest(), settings),
        "formats": config.formats,
        "num_shards": plan.num_shards,
        "part_count": config.part_of()[1],
        "encoders": encoders(),
        "manifest": {
            "source": {"kind": source.kind, "name": source.path.resolve().name},
            "labels": "several" if several else "class" if listing.class_names else "none",
            "class_names": listing.class_names,
            "images": _policy(config),
            "seed": config.seed,
        },
    }


def _policy(config: ConvertConfig) -> dict[str, str]:
    """Returns what is stored of images, in words."""
    jpeg = f"JPEG of quality {config.quality}, {'4:4:4' if config.quality >= 95 else '4:2:0'}"
    form = "PNG" if config.lossless else jpeg
    policy = {
        "kept": "8-bit grey or YCbCr JPEG, byte for byte; a missing end marker is added",
        "transcoded": f"everything else: {form}; alpha over white, 16 bits scaled to 8",
        "check": config.check,
    }
    if config.lossless:
        policy["kept"] += "; 8-bit grey or RGB PNG, byte for byte"
    if config.bad == "fix":
        policy["fixed"] = f"damaged images, as far as they can be decoded: {jpeg}"
    if config.resize_shorter:
        policy["resized"] = f"shorter side at most {config.resize_shorter} pixels: {jpeg}"
    return policy


def _storing(config: ConvertConfig) -> Storing:
    return Storing(
        check=config.check,
        bad=config.bad,
        lossless=config.lossless,
        resize_shorter=config.resize_shorter,
        quality=config.quality,
    )


def _whole(journal: Journal) -> dict[str, Manifest]:
    """Returns the manifests of sets that were found whole."""
    found = {}
    for form in journal.formats:
        ShardSet.open(journal.folder(form)).close()
        found[form] = Manifest.read(journal.folder(form))
    return found


def _write_shards(source: Source, journal: Journal, plan: _Plan, config: ConvertConfig, report: Report) -> None:
    """Writes all shards that are not there yet."""
    mine = _mine(plan, config)
    finished = journal.finished()
    waiting = [number for number in mine if plan.name(number) not in finished]
    total = sum(plan.num_samples(number) for number in mine)
    resumed = total - sum(plan.num_samples(number) for number in waiting)
    num_bytes = plan.num_bytes_of(waiting)
    counters = Counters(worker_context(), plan.num_shards)

    def tell() -> None:
        images, size, bad = counters.totals()
        report(
            Progress(
                images=resumed + images, bytes=size, bad=bad, total_images=total, total_bytes=num_bytes,
                resumed_images=resumed,
            )
        )  # fmt: skip

    tell()
    if not waiting:
        return
    if _minds_space(config):
        require_space(journal.out, num_bytes * len(config.formats))
    checks_images = config.check == "decode"
    names = in_processes(
        worker.run,
        ((plan.task(number),) for number in waiting),
        workers=config.workers if checks_images else min(config.workers, len(waiting)),
        counters=counters,
        initializer=worker.start,
        initargs=(source, journal.paths_only(), _storing(config), counters),
        tell=tell,
        spare=_checks_ahead(journal, plan, counters) if checks_images else nothing,
        died_at=lambda: _names_at(journal, plan, counters),
    )
    for _ in names:
        pass  # shards stay where they were put


def _checks_ahead(journal: Journal, plan: _Plan, counters: Counters) -> Spare:
    """Returns a function that gives an idle worker images of unfinished shards to check."""
    remainder = Remainder(counters.entered, plan.num_samples, plan.samples)

    def spare() -> Callable[[], None] | None:
        piece = remainder.take()
        if piece is None:
            return None
        checks = journal.checks(plan.name(piece.task))
        checks.touch()
        counters.help(piece.task)
        return functools.partial(worker.check, piece, checks)

    return spare


def _names_at(journal: Journal, plan: _Plan, counters: Counters) -> str:
    """Returns the images that workers were at, as part of a sentence."""
    entered = counters.entered()
    for number, _ in counters.entered():
        with suppress(FileNotFoundError), Checks(journal.checks(plan.name(number))) as checks:
            entered += [(number, sample) for sample in checks.looked_at()]
    names = [plan.samples(number, sample, sample + 1).names[0] for number, sample in entered]
    if not names:
        return ""
    return f" at {', '.join(names[:-1])}{' or ' if len(names) > 1 else ''}{names[-1]}"

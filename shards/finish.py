"""The end of a conversion: quarantine list, index and manifest, from what the workers left."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from maestri.shards import index
from maestri.shards.errors import ShardError
from maestri.shards.files import sync, write_atomically, xxh128_of
from maestri.shards.journal import Journal
from maestri.shards.manifest import Manifest, ShardInfo

QUARANTINE_LIST = "quarantine.jsonl"


def finish(journal: Journal) -> dict[str, Manifest]:
    """Makes the set whole in every format and returns the manifests; memory does not grow with the set.

    Raises:
        ShardError: shards are missing, or hold no image at all.
    """
    names = list(_shard_names(journal))
    records = [journal.record(name) for name in names]
    bad = [{"shard": name, **entry} for name, record in zip(names, records, strict=True) for entry in record["bad"]]
    if not any(record["images"] for record in records):
        source = journal.head["manifest"]["source"]["name"]
        journal.discard(names)
        first = f"{bad[0]['source']}: {bad[0]['reason']}"
        raise ShardError(f"none of the {len(bad)} images of {source} can be read; the first: {first}")
    for name, record in zip(names, records, strict=True):
        if not record["images"]:
            journal.drop_shard(name)  # DALI refuses an empty one
    kept = [(name, record) for name, record in zip(names, records, strict=True) if record["images"]]
    manifests = {}
    for form in journal.formats:
        listed = "".join(json.dumps(entry) + "\n" for entry in bad)
        write_atomically(journal.folder(form) / QUARANTINE_LIST, listed.encode(), drafts=journal.drafts)
        described = _write_index(journal, form, kept)
        manifests[form] = Manifest(
            **{**journal.head["manifest"], "class_names": tuple(journal.head["manifest"]["class_names"])},
            format=form,
            num_samples=sum(record["images"] for _, record in kept),
            num_quarantined=len(bad),
            shards=tuple(
                ShardInfo(name=f"{name}.{form}", num_samples=record["images"], **record["files"][form])
                for name, record in kept
            ),
            index=described,
            recipe=journal.head["recipe"],
        )
    for form, manifest in manifests.items():
        manifest.write(journal.folder(form))
    journal.remove()
    return manifests


def _shard_names(journal: Journal) -> Iterator[str]:
    """Yields all shards' names.

    Raises:
        ShardError: some are missing; the parts to which they belong are named.
    """
    count, num_parts = journal.head["num_shards"], journal.head["part_count"]
    width = max(5, len(str(count)))
    finished = journal.finished()
    names = [f"shard-{number:0{width}d}" for number in range(count)]
    missing = [number for number, name in enumerate(names) if name not in finished]
    if missing:
        parts = sorted({number % num_parts + 1 for number in missing})
        which = ", ".join(f"--part {part}/{num_parts}" for part in parts[:5]) + (", …" if len(parts) > 5 else "")
        first = names[missing[0]]
        raise ShardError(f"{len(missing)} of {count} shards are missing, the first is {first}; still to run: {which}")
    yield from names


def _write_index(journal: Journal, form: str, kept: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Writes the index of the set in a format and returns the manifest's description of it."""
    num_rows = sum(record["images"] for _, record in kept)
    several = journal.head["manifest"]["labels"] == "several"
    num_labels = sum(record["labels"] for _, record in kept) if several else None
    layout = index.layout_of(num_rows, key_bytes=sum(record["key_bytes"] for _, record in kept), num_labels=num_labels)
    path = journal.folder(form) / index.FILE_NAME
    draft = index.IndexDraft(journal.drafts / f"{form}.index", num_rows, layout)
    try:
        for number, (name, _) in enumerate(kept):
            columns = journal.columns(name)
            columns["offset"] = columns[f"offset_{form}"]
            columns["shard"] = np.full(len(columns["bytes"]), number, np.int64)
            draft.add(columns)
    finally:
        draft.close()
    finished = journal.drafts / f"{form}.index"
    sync(finished)
    described = {"bytes": finished.stat().st_size, "xxh128": xxh128_of(finished), "columns": layout}
    finished.replace(path)
    sync(path.parent)
    return described

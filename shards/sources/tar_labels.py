"""Where a sample of a WebDataset tar has its label, whoever made it: ``index`` and ``convert`` read the same."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from maestri.shards.errors import ShardError

LABEL_MEMBERS = ("cls", "index", "json")
"""Extensions that hold labels, in the order in which they are looked for."""
JSON_KEYS = ("label", "labels", "cls", "class", "target")
"""Where a JSON member has its labels, in the order in which they are looked for."""
MAX_LABEL = 1 << 20
"""Bytes of a member with labels; a larger one is taken for something else."""
_NUMBER = re.compile(r"-?[0-9]{1,19}")


def label_among(sizes: Mapping[str, int], read: Callable[[str], bytes], name: str, where: str) -> tuple[Any, str]:
    """Returns a sample's label as it is written (None for none) and the extension of its member, empty for none.

    Args:
        sizes: bytes of each member by extension, in lower case.
        read: returns the content of a member.
        name: the label's extension (``cls``), or a key of a JSON member (``label``, ``meta.json:label``); empty for the
            first of ``LABEL_MEMBERS`` that says something.
        where: the sample, for the text of an error.

    Raises:
        ShardError: the member holds no label.
    """
    member, _, key = name.partition(":")
    members: list[tuple[str, tuple[str, ...]]]
    if not name:
        members = [(extension, JSON_KEYS) for extension in LABEL_MEMBERS]
    elif key:
        members = [(member.lower(), (key,))]
    else:
        members = [(member.lower(), JSON_KEYS), ("json", (member,))]
    for extension, json_keys in members:
        if extension not in sizes:
            continue
        if sizes[extension] > MAX_LABEL:
            raise ShardError(f"{where}.{extension} should hold a label and has {sizes[extension]} bytes")
        value = _label_in(read(extension), extension, json_keys, f"{where}.{extension}")
        if value is not None:
            return value, extension
    return None, ""


def _label_in(data: bytes, extension: str, json_keys: tuple[str, ...], where: str) -> Any:
    if extension.rpartition(".")[2] == "json":
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise ShardError(f"{where} is no JSON: {data[:40]!a}") from None
        if not isinstance(fields, dict):
            return fields
        return next((fields[key] for key in json_keys if fields.get(key) is not None), None)
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        raise ShardError(f"{where} should hold a label and is no text: {data[:40]!a}") from None
    if not text:
        return None
    return int(text) if _NUMBER.fullmatch(text) else text

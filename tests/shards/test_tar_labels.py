"""Labels of tars that others made: ``index`` and ``convert`` read the same."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maestri.shards.adopt import AdoptConfig, adopt
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardError
from maestri.shards.shard_set import ShardSet
from maestri.shards.sources.tar_labels import JSON_KEYS, MAX_LABEL

Members = list[dict[str, bytes]]
LABELS = [2, 0, 1, 2]


def members(extension: str, contents: list[bytes]) -> Members:
    return [{extension: content} for content in contents]


NUMBERS = [b"%d" % label for label in LABELS]
AS_JSON = [json.dumps({"width": 3, "x": label}) for label in LABELS]
TARS: dict[str, tuple[Members, str, list[list[str]]]] = {
    "cls": (members("cls", NUMBERS), "", [["2"], ["0"], ["1"], ["2"]]),
    "cls with blanks": (members("cls", [b" 2\n", b"-1", b"+1", b"x"]), "", []),
    "index": (members("index", NUMBERS), "", [["2"], ["0"], ["1"], ["2"]]),
    "INDEX": (members("INDEX", NUMBERS), "", [["2"], ["0"], ["1"], ["2"]]),
    "Cls": (members("Cls", NUMBERS), "", [["2"], ["0"], ["1"], ["2"]]),
    "names": (members("cls", [b"dog", b"cat", b"", b"dog"]), "", [["dog"], ["cat"], [], ["dog"]]),
    **{
        f"json {key}": (members("json", [text.replace("x", key).encode() for text in AS_JSON]), "", [])
        for key in JSON_KEYS
    },
    "JSON": (members("JSON", [text.replace("x", "label").encode() for text in AS_JSON]), "", []),
    "json of both": (members("json", [b'{"label": 1, "labels": [0, 1]}', b'{"labels": [0]}'] * 2), "", []),
    "json of several": (members("json", [b'{"labels": [0, 1]}', b'{"labels": []}'] * 2), "", [["0", "1"], []] * 2),
    "json of a number": (members("json", NUMBERS), "", [["2"], ["0"], ["1"], ["2"]]),
    "json before the image's": (
        [{"json": b'{"label": 9}', "cls": number} for number in NUMBERS], "", [["2"], ["0"], ["1"], ["2"]],
    ),
    "empty cls": ([{"cls": b"", "json": b'{"label": %s}' % number} for number in NUMBERS], "", []),
    "member": (members("txt", NUMBERS), "txt", [["2"], ["0"], ["1"], ["2"]]),
    "member in capitals": (members("TXT", NUMBERS), "txt", [["2"], ["0"], ["1"], ["2"]]),
    "key": (members("json", [text.encode() for text in AS_JSON]), "x", [["2"], ["0"], ["1"], ["2"]]),
    "key of a member": (
        members("meta.json", [text.encode() for text in AS_JSON]), "meta.json:x", [["2"], ["0"], ["1"], ["2"]],
    ),
    "json alone": (members("json", [text.replace("x", "cls").encode() for text in AS_JSON]), "json", []),
    "nothing": (members("txt", NUMBERS), "", [[]] * 4),
}  # fmt: skip


def write(folder: Path, samples: Members, make_jpeg: Callable[..., bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as archive:
        for at, sample in enumerate(samples):
            for extension, content in {**sample, "jpg": make_jpeg(seed=at)}.items():
                info = tarfile.TarInfo(f"{at}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return folder


def labels_in(folder: Path) -> list[list[str]]:
    with ShardSet.open(folder) as shard_set:
        names = shard_set.manifest.class_names
        return [[names[label] for label in shard_set.labels_of(row)] for row in range(len(shard_set))]


@pytest.mark.parametrize("name", TARS)
def test_labels__are_the_same_for_index_and_convert(name: str, make_jpeg: Callable[..., bytes], tmp_path: Path) -> None:
    samples, label, expected = TARS[name]
    folder = write(tmp_path / "tars", samples, make_jpeg)
    found, problems = [], []
    for action in (
        lambda: adopt(folder, tmp_path / "indexed", AdoptConfig(workers=1, label=label, check="header")),
        lambda: convert(folder, tmp_path / "converted", ConvertConfig(workers=1, label=label, check="header", seed=-1)),
    ):
        try:
            action()
        except ShardError as error:
            problems.append(str(error))
    for out in ("indexed", "converted"):
        if not problems:
            found.append(labels_in(tmp_path / out))
    if name == "cls with blanks":
        assert len(problems) == 2 and all("some labels are numbers, some are names" in text for text in problems)
    else:
        assert not problems
        assert found[0] == found[1]
        assert not expected or found[0] == expected
        assert name == "nothing" or any(found[0])


@pytest.mark.parametrize(
    ("extension", "content", "message"),
    [
        ("cls", b"\xff", "x.tar:0.cls should hold a label and is no text"),
        ("json", b"{", "x.tar:0.json is no JSON"),
        ("cls", bytes(MAX_LABEL + 1), "x.tar:0.cls should hold a label and has 1048577 bytes"),
    ],
)
def test_labels__that_are_none_are_named_alike(
    extension: str, content: bytes, message: str, make_jpeg: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = write(tmp_path / "tars", members(extension, [content]), make_jpeg)
    with pytest.raises(ShardError, match=message):
        adopt(folder, tmp_path / "indexed", AdoptConfig(workers=1))
    with pytest.raises(ShardError, match=message):
        convert(folder, tmp_path / "converted", ConvertConfig(workers=1))


def test_index__too_large_an_image_is_not_read(
    make_jpeg: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestri.shards import images

    folder = write(tmp_path / "tars", members("cls", NUMBERS), make_jpeg)
    sizes = [len(make_jpeg(seed=at)) for at in range(4)]
    monkeypatch.setattr(images, "MAX_IMAGE", max(sizes) - 1)
    _, manifest = adopt(folder, None, AdoptConfig(workers=1))
    assert manifest.num_quarantined == np.sum(np.array(sizes) == max(sizes))
    assert f"{max(sizes)} bytes, and no image has more than" in (folder / "quarantine.jsonl").read_text()

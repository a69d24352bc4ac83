"""Images of every kind that people have, and sets made of them."""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.shard_set import ShardSet


def picture(width: int = 24, height: int = 16, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Returns smooth noise."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Returns an image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(width: int = 24, height: int = 16, mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """Returns a JPEG of smooth noise."""
    return encoded(picture(width, height, mode, seed), **options)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes files by relative path and returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_set(source: Path, out: Path, **settings: Any) -> ShardSet:
    """Converts a source with one worker and opens the set."""
    convert(source, out, ConvertConfig(**{"workers": 1, **settings}))
    return ShardSet.open(out)


def write_tars(folder: Path, jpegs: list[bytes]) -> Path:
    """Writes tars as a user of webdataset does, with more members than an image and a label."""
    import webdataset  # and torch with it: slow, and few tests need it

    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "train-%03d.tar"), maxcount=4, verbose=0) as sink:
        for number, data in enumerate(jpegs):
            meta = {"width": 1, "label": "not this"}
            sink.write({"__key__": f"n{9 - number % 10}/im{number:03d}", "jpg": data, "cls": number % 3, "json": meta})
    return folder


def module_beside(name: str) -> ModuleType:
    """Returns a module that lies beside this file; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_module() -> Callable[[str], ModuleType]:
    return module_beside


@pytest.fixture(scope="session")
def make_tars() -> Callable[[Path, list[bytes]], Path]:
    return write_tars


@pytest.fixture
def jpegs() -> list[bytes]:
    return [jpeg(20 + number, 30, seed=number) for number in range(10)]


@pytest.fixture
def foreign(jpegs: list[bytes], tmp_path: Path) -> Path:
    """A folder of three tars that webdataset wrote of ``jpegs``."""
    return write_tars(tmp_path / "foreign", jpegs)


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture(scope="session")
def make_folder() -> Callable[[Path, dict[str, bytes]], Path]:
    return write_files


@pytest.fixture(scope="session")
def read_all() -> Callable[[Path], dict[str, bytes]]:
    return contents


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 JPEGs in three classes, with names that need escaping."""
    files = {}
    for number in range(60):
        name = (f"{number}", f"deep/v1.{number}", f"with blank {number}", f"é{number}", "long" * 40 + f"{number}")
        files[f"class {number % 3}/{name[number % 5]}.jpg"] = jpeg(20 + number, 30, seed=number)
    return write_files(tmp_path_factory.mktemp("source") / "images", files)


@pytest.fixture(scope="session")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set made of ``images``, with several shards; not to be written to."""
    out = tmp_path_factory.mktemp("sets") / "whole"
    make_set(images, out, shard_bytes=8000).close()
    return out

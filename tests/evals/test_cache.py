import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maestri.evals import cache as caching
from maestri.evals.cache import FeatureCache, cached_features
from maestri.evals.features import ImageSettings, Judged, raw_pixels
from maestri.shards.shard_set import ShardSet

OF = {"model": {"weights": "abc"}, "rows": {"count": 3}}
TABLE = {"cls": torch.arange(6.0).view(3, 2), "mean": torch.arange(9, dtype=torch.float16).view(3, 3)}
IMAGES = ImageSettings(size=16, crop_fraction=1.0, batch_size=64, num_threads=1, device=torch.device("cpu"))
KILLED = """
import os, signal, sys, torch
from pathlib import Path
from maestri.evals import cache
cache.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # the first file is written, nothing else
kept = cache.FeatureCache(Path(sys.argv[1]))
with kept.locked():
    kept.save({"model": {"weights": "abc"}, "rows": {"count": 3}}, {"cls": torch.ones(3, 2)})
"""


def test_load__what_was_saved_in_memory_maps(tmp_path: Path):
    cache = FeatureCache(tmp_path / "features")
    assert cache.load(OF) is None
    cache.save(OF, TABLE)
    found = cache.load(OF)
    assert found is not None and list(found) == ["cls", "mean"]
    for pooling, values in TABLE.items():
        assert found[pooling].dtype == values.dtype and torch.equal(found[pooling], values)
    found["cls"][0] = 7.0  # this process's own page
    again = cache.load(OF)
    assert again is not None and torch.equal(again["cls"], TABLE["cls"])


@pytest.mark.parametrize("damage", ["bit", "short", "entry", "missing", "foreign", "empty"])
def test_load__damage_is_noted_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str):
    cache = FeatureCache(tmp_path)
    cache.save(OF, TABLE)
    entry = cache.path_of(OF)
    content = (entry / "mean.npy").read_bytes()
    if damage == "bit":
        (entry / "mean.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "short":
        (entry / "mean.npy").write_bytes(content[:-2])
    elif damage == "entry":
        (entry / "entry.json").write_text("{")
    elif damage == "missing":
        (entry / "cls.npy").unlink()
    elif damage == "foreign":
        cache.save({"model": "another"}, TABLE)
        shutil.copy(cache.path_of({"model": "another"}) / "entry.json", entry)
    else:
        (entry / "entry.json").write_text("[]")
    assert cache.load(OF) is None
    assert str(entry) in caplog.text and "computed again" in caplog.text
    cache.save(OF, TABLE)
    assert cache.load(OF) is not None


def test_save__a_kill_leaves_no_entry_and_no_lock(tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    cache = FeatureCache(tmp_path)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1 and cache.load(OF) is None
    with cache.locked():
        cache.save(OF, TABLE)
    assert not list(tmp_path.glob(".*.tmp")) and cache.load(OF) is not None


def test_path_of__depends_on_everything():
    cache = FeatureCache(Path("features"))
    others = [OF, {**OF, "rows": {"count": 4}}, {**OF, "model": {"weights": "xyz"}}, {**OF, "precision": "float16"}]
    assert len({cache.path_of(other) for other in others}) == len(others)
    assert cache.path_of(OF) == cache.path_of(dict(reversed(OF.items())))


def test_cached_features__are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    models = {"raw": Judged(extract=raw_pixels, identity={"raw": "pixels"})}
    cache, rows = FeatureCache(tmp_path), np.arange(40)
    with ShardSet.open(folder / "train") as shard_set:
        first = cached_features(models, shard_set, rows, IMAGES, cache)
        with monkeypatch.context() as patched:
            patched.setattr(caching, "extract_features", None)  # decoding anything would fail
            second = cached_features(models, shard_set, rows, IMAGES, cache)
        more = {**models, "other": Judged(extract=raw_pixels, identity={"raw": "others"})}
        third = cached_features(more, shard_set, rows, IMAGES, cache)
        without = cached_features(models, shard_set, rows[:20], IMAGES, None)
    assert first["raw"]["raw"].shape == (40, 3 * 16 * 16)
    assert torch.equal(first["raw"]["raw"], second["raw"]["raw"])
    assert list(third) == ["raw", "other"]
    assert torch.equal(without["raw"]["raw"], first["raw"]["raw"][:20])
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_cached_features__damage_is_repaired(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    models = {"raw": Judged(extract=raw_pixels, identity={"raw": "pixels"})}
    with ShardSet.open(folder / "train") as shard_set, caplog.at_level(logging.INFO):
        first = cached_features(models, shard_set, np.arange(20), IMAGES, FeatureCache(tmp_path))
        (file,) = tmp_path.glob("*/raw.npy")
        file.write_bytes(b"torn")
        second = cached_features(models, shard_set, np.arange(20), IMAGES, FeatureCache(tmp_path))
    assert torch.equal(first["raw"]["raw"], second["raw"]["raw"])
    assert "checksum" in caplog.text
    assert torch.equal(torch.from_numpy(np.load(file)), first["raw"]["raw"])

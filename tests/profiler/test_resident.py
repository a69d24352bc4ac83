"""Batches that stay: as the loader would make them, but for pixels and labels."""

import torch

from maestri.pipelines.corruption import CorruptionConfig
from maestri.pipelines.masks import MaskConfig
from maestri.pipelines.views import LocalConfig, ViewsConfig
from maestri.profiler.resident import repeated, resident_batch

CPU = torch.device("cpu")


def test_resident_batch__masks_are_those_of_the_positions() -> None:
    views = ViewsConfig(size=32, count=2, mask=MaskConfig(ratio=0.75), local=LocalConfig(count=3, size=16))
    whole = resident_batch(views, patch=4, seed=1, positions=range(6), device=CPU)
    share = resident_batch(views, patch=4, seed=1, positions=range(4, 6), device=CPU)
    assert whole.views["global"].shape == (2, 6, 3, 32, 32) and whole.views["global"].dtype == torch.uint8
    assert whole.views["local"].shape == (3, 6, 3, 16, 16)
    assert whole.visible["global"].shape == (2, 6, 16) and whole.masked["global"].shape == (2, 6, 48)
    assert whole.token_mask["global"].sum(dim=-1).eq(48).all()
    assert whole.token_mask["global"].gather(-1, whole.masked["global"]).all()
    assert torch.equal(whole.visible["global"][:, 4:], share.visible["global"])
    assert share.position == 4 and share.rows.tolist() == [4, 5] and share.labels.tolist() == [-1, -1]
    batches = repeated(whole)
    assert next(batches) is next(batches) is whole


def test_resident_batch__corrupted_twins() -> None:
    views = ViewsConfig(size=32, count=2, corruption=CorruptionConfig(coverage=0.3))
    batch = resident_batch(views, patch=4, seed=0, positions=range(2), device=CPU)
    assert batch.views["global_corrupted"].shape == batch.views["global"].shape
    assert not batch.visible and not batch.masked

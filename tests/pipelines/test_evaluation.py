"""Evaluation's batches."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from maestri.pipelines.evaluation import evaluation_batches
from maestri.pipelines.reader import TooManyBadSamples


@pytest.fixture(autouse=True, params=["dali", "threads"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs every test with both executors."""
    monkeypatch.setattr("maestri.pipelines.evaluation.choose_executor", lambda name, device: request.param)
    return request.param


_OPTIONS = {"size": 28, "crop_fraction": 1.0, "batch_size": 8, "device": torch.device("cpu"), "num_threads": 1}


def test_evaluation_batches__rows_in_order_with_a_short_end(tiny_greys) -> None:
    rows = np.array([5, 3, 39, 0, 1, 2, 4, 6, 8, 7, 5])
    batches = list(evaluation_batches(tiny_greys, rows, **_OPTIONS))
    assert [len(labels) for _, labels in batches] == [8, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == (rows % 10).tolist()
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (11, 3, 28, 28)
    assert images.dtype == torch.uint8
    for image, row in zip(images, rows, strict=True):
        # The whole image at its own size: nothing is resampled.
        decoded = np.array(Image.open(io.BytesIO(tiny_greys.encoded[row])).convert("RGB"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decoded)


def test_evaluation_batches__no_rows(tiny_greys) -> None:
    assert list(evaluation_batches(tiny_greys, np.array([], np.int64), **_OPTIONS)) == []


def test_evaluation_batches__can_be_left_early(tiny_greys) -> None:
    batches = evaluation_batches(tiny_greys, np.arange(40), **_OPTIONS)
    next(batches)
    batches.close()


def test_evaluation_batches__bad_sample(make_photos: Callable) -> None:
    shard_set = make_photos(20, kind="grey", smallest=28, largest=29)
    shard_set.encoded[9] = b""
    rows = np.arange(20)
    with pytest.raises(TooManyBadSamples, match="fake/000009"):
        list(evaluation_batches(shard_set, rows, **_OPTIONS))
    labels = torch.cat([labels for _, labels in evaluation_batches(shard_set, rows, max_bad=1, **_OPTIONS)])
    assert labels[8:12].tolist() == [8, 0, 0, 1]

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maestri.evals.lowshot import LowshotSettings, centred, evaluate_lowshot, few_shot_accuracy, labelled_rows
from maestri.evals.protocol import FeatureSets, LabelledFeatures
from maestri.evals.sets import Splits, read_labels
from maestri.pipelines.selection import SelectionConfig, select_rows
from maestri.shards.shard_set import ShardSet


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    return folder / "train"


@pytest.fixture(scope="module")
def images(folder: Path, shards: Path) -> FeatureSets:
    """300 digits in shards, 60 of them held out, with features that tell classes apart but for some noise."""
    splits = Splits(shards=shards, holdout=60, test_shards=folder / "test")
    sets = read_labels(splits, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def with_features(part: LabelledFeatures, noise: float) -> LabelledFeatures:
        sharp = torch.nn.functional.one_hot(part.labels, 10) + noise * torch.randn(
            len(part.labels), 10, generator=generator
        )
        blurred = sharp + torch.randn(sharp.shape, generator=generator)
        return replace(part, tables={"student": {"cls": blurred, "mean": sharp}})

    assert sets.test is not None
    return replace(sets, train=with_features(sets.train, 0.2), test=with_features(sets.test, 0.2))


def test_labelled_rows__as_many_of_each_class_and_none_held_out(images: FeatureSets, shards: Path):
    splits = labelled_rows(images, LowshotSettings(shots=(1, 2, 5), percent=10.0), shards=shards, seed=7)
    assert list(splits) == ["1-shot", "2-shot", "5-shot", "10 %"]
    labels = images.train.labels
    for count in (1, 2, 5):
        for rows in splits[f"{count}-shot"]:
            assert torch.bincount(labels[rows]).tolist() == [count] * 10 and rows.max() < 240
    assert len({rows.tobytes() for rows in splits["5-shot"]}) == 3, "three different splits"
    for few, more in zip(splits["2-shot"], splits["5-shot"], strict=True):
        assert set(few.tolist()) < set(more.tolist()), "a larger one holds all of a smaller one"
    counts = np.bincount(labels[:240])
    assert torch.bincount(labels[splits["10 %"][0]]).tolist() == [-(-int(count) // 10) for count in counts]


def test_labelled_rows__are_those_that_a_run_would_train_on(images: FeatureSets, shards: Path):
    """A pure function of the seed, and the same one as ``data.select``'s."""
    splits = labelled_rows(images, LowshotSettings(shots=(2,), percent=0), shards=shards, seed=7)
    with ShardSet.open(shards) as shard_set:
        for number, rows in enumerate(splits["2-shot"]):
            expected = select_rows(shard_set, SelectionConfig(per_class=2, seed=7 + number), num_rows=240)
            assert expected is not None and np.array_equal(rows, expected)


def test_labelled_rows__lists_of_one_length_are_splits_of_a_kind(images: FeatureSets, shards: Path, tmp_path: Path):
    with ShardSet.open(shards) as shard_set:
        keys = [shard_set.key(row) for row in range(300)]
    for name, rows in (("a.txt", range(20)), ("b.txt", range(280, 300)), ("c.txt", range(30))):
        lines = [f"{keys[row].rpartition('/')[2]}.JPEG" for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    lists = tuple(tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    splits = labelled_rows(images, LowshotSettings(lists=lists), shards=shards, seed=0)
    assert {kind: len(of_kind) for kind, of_kind in splits.items()} == {"20 listed": 2, "30 listed": 1}
    assert splits["20 listed"][1].tolist() == list(range(280, 300)), "listed images may be held-out ones"
    report = evaluate_lowshot(images, LowshotSettings(lists=lists, strengths=(10.0,)), shards=shards, seed=0)
    assert report["20 listed"].num_images == (20, 20)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("nothing.JPEG\n", "1 of 1 lines of .*list.txt are no sample; the first: line 1: 'nothing.JPEG'"),
        ("\n", "--lists .*list.txt lists no sample"),
    ],
)
def test_labelled_rows__list_that_does_not_match(
    images: FeatureSets, shards: Path, tmp_path: Path, lines: str, expected: str
):
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(ValueError, match=expected):
        labelled_rows(images, LowshotSettings(lists=(tmp_path / "list.txt",)), shards=shards, seed=0)


def test_labelled_rows__a_class_with_too_few_is_named(images: FeatureSets, shards: Path):
    counts = torch.bincount(images.train.labels[:240]).tolist()
    rarest = counts.index(min(counts))
    with pytest.raises(ValueError, match=f"class 'digit_{rarest}' has {min(counts)} that are not held out"):
        labelled_rows(images, LowshotSettings(shots=(min(counts) + 1,)), shards=shards, seed=0)


def test_evaluate_lowshot__mean_and_deviation_over_splits(images: FeatureSets, shards: Path):
    settings = LowshotSettings(shots=(1, 5), percent=0, strengths=(1.0, 100.0))
    report = evaluate_lowshot(images, settings, shards=shards, seed=0)
    splits = labelled_rows(images, settings, shards=shards, seed=0)["5-shot"]
    test = images.test
    assert test is not None
    features, labels = centred(images.train.tables["student"]["cls"]), images.train.labels
    queries = {"test": (centred(test.tables["student"]["cls"]), test.labels)}
    alone = [few_shot_accuracy(features[rows], labels[rows], queries, strength=100.0)["test"] for rows in splits]
    assert report["5-shot"].test["student"]["cls"][100.0] == pytest.approx(np.mean(alone))
    assert report["5-shot"].test_deviation["student"]["cls"][100.0] == pytest.approx(np.std(alone, ddof=1))
    assert report["5-shot"].choice("student")[0] == "mean"
    assert report["5-shot"].chosen("student") > report["1-shot"].chosen("student") > 60


def test_centred__rows_of_mean_0_and_length_1():
    rows = centred(torch.randn(5, 8, dtype=torch.float16) + 3)
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    "wrong", [{"shots": (0,)}, {"percent": 101.0}, {"splits": 0}, {"strengths": ()}, {"shots": (), "percent": 0}]
)
def test_settings__range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LowshotSettings(**wrong)

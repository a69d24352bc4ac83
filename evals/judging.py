"""The protocols of ``maestri eval``, run on a source's features, and the files they leave."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maestri.evals.clustering import ClusterSettings, evaluate_clusters
from maestri.evals.knn import KnnSettings, evaluate_knn
from maestri.evals.linear import LinearSettings, evaluate_linear
from maestri.evals.lowshot import LowshotSettings, evaluate_lowshot, labelled_rows
from maestri.evals.protocol import ClusterReport, FeatureSets, LowshotReport
from maestri.evals.report import accuracy_summary, cluster_summary, lowshot_summary
from maestri.evals.sheets import MARK, Sheet, accuracy_sheet, cluster_sheet, lowshot_sheet
from maestri.shards.files import write_atomically

Protocol = Literal["knn", "linear", "lowshot", "cluster"]
Settings = KnnSettings | LinearSettings | LowshotSettings | ClusterSettings
TITLES = {
    "knn": "k-NN top-1, %",
    "linear": "Linear probe top-1, %, by learning rate",
    "lowshot": "Logistic regression on few images, top-1, %",
    "cluster": "k-means clusters against classes, %",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a protocol found."""

    protocol: Protocol
    """Its name."""
    summary: Mapping[str, Any]
    """For JSON."""
    sheet: Sheet
    """For people."""


def check_settings(settings: Settings, sets: FeatureSets, *, shards: Path, seed: int) -> None:
    """Checks that the images are enough for a protocol, before features are computed; arguments as below.

    Raises:
        ValueError: they are too few, or a list does not match the shards.
    """
    num_bank = len(sets.train.labels) - sets.num_held_out
    if isinstance(settings, KnnSettings) and num_bank < max(settings.k):
        raise ValueError(f"k asks for {max(settings.k)} neighbours, but there are only {num_bank} labelled images")
    if isinstance(settings, LinearSettings) and num_bank < 2:
        raise ValueError(f"a linear probe needs at least 2 images to learn from, and there are {num_bank}")
    if isinstance(settings, LowshotSettings):
        labelled_rows(sets, settings, shards=shards, seed=seed)
    if isinstance(settings, ClusterSettings):
        for name, count in (("held-out", sets.num_held_out), ("test", len(sets.test.labels) if sets.test else 0)):
            if 0 < count < sets.num_classes:
                raise ValueError(f"{count} {name} images are too few for {sets.num_classes} clusters")


def judge_features(protocol: Protocol, settings: Settings, sets: FeatureSets, *, shards: Path, seed: int) -> Judgement:
    """Returns what a protocol finds; every rank must call it.

    Args:
        protocol: its name.
        settings: its own.
        sets: the images.
        shards: the training shards, in which lists of images are looked up.
        seed: of splits, of the order of images and of clusters' first centres.

    Raises:
        ValueError: the images are too few for it.
    """
    title = TITLES[protocol]
    if isinstance(settings, KnnSettings):
        knn = evaluate_knn(sets, settings)
        return Judgement(protocol=protocol, summary=accuracy_summary(knn), sheet=accuracy_sheet(knn, title))
    if isinstance(settings, LinearSettings):
        linear = evaluate_linear(sets, settings, seed=seed)
        return Judgement(protocol=protocol, summary=accuracy_summary(linear), sheet=accuracy_sheet(linear, title))
    if isinstance(settings, LowshotSettings):
        few: LowshotReport = evaluate_lowshot(sets, settings, shards=shards, seed=seed)
        return Judgement(protocol=protocol, summary=lowshot_summary(few), sheet=lowshot_sheet(few, title))
    clusters: ClusterReport = evaluate_clusters(sets, settings, seed=seed)
    return Judgement(protocol=protocol, summary=cluster_summary(clusters), sheet=cluster_sheet(clusters, title))


def write_judgement(folder: Path, judgement: Judgement, about: Mapping[str, Any]) -> str:
    """Writes ``<protocol>.json`` and ``<protocol>.md``, each whole or not at all, and returns the JSON.

    Args:
        folder: made where it is missing.
        judgement: what was found.
        about: what was judged, on what and how; it heads both files.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"protocol": judgement.protocol, **about, **judgement.summary}, indent=2, default=str) + "\n"
    head = "".join(f"- {name}: {_words(value)}\n" for name, value in about.items())
    write_atomically(folder / f"{judgement.protocol}.json", text.encode())
    write_atomically(folder / f"{judgement.protocol}.md", f"{judgement.sheet.as_markdown()}\n{head}".encode())
    return text


def overview(judgements: list[Judgement]) -> Sheet:
    """Returns each model's figures at its choices, side by side for all protocols."""
    columns: list[str] = []
    rows: dict[str, list[str]] = {}
    for judgement in judgements:
        figures = judgement.summary["top1"]
        kinds = {"": figures} if judgement.protocol != "lowshot" else figures
        for kind, of_model in kinds.items():
            columns.append(f"{judgement.protocol}{' ' + kind if kind else ''}".replace("lowshot ", ""))
            for model, entry in of_model.items():
                rows.setdefault(model, []).append(f"{entry['top1']:.1f}")
    best = {judgement.protocol: judgement.summary["best_model"] for judgement in judgements}
    note = f"{MARK} best on held-out images: " + ", ".join(f"{name}: {model}" for name, model in best.items())
    return Sheet(
        title="Top-1, %, at what held-out images chose",
        columns=("", *columns),
        rows={model: [("", *cells)] for model, cells in rows.items()},
        num_words=1,
        note=note,
    )


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

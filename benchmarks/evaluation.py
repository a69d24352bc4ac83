"""Compares k-NN and linear probes with scikit-learn on the same features: ``python benchmarks/evaluation.py [RUN …]``.

Features are scikit-learn's digits (pixels, 1,200 to learn from and 597 to classify) and, of each run, those of its
newest student at the first 20,000 training images and all test images (``maestri eval`` keeps them in RUN/features;
what is missing is computed).  k-NN is computed again by ``KNeighborsClassifier`` (brute force, cosine distance, weights
exp((1 − distance) / 0.07)), and the probes' best rate is set against the best of ``LogisticRegression`` over C, on
plain and on standardised features.  Both bests are taken on the test images: this compares methods, and is no result.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from maestri.evals.cache import FeatureCache, cached_features
from maestri.evals.features import ImageSettings
from maestri.evals.knn import knn_accuracy
from maestri.evals.linear import LinearSettings, train_probes
from maestri.evals.sources import STUDENT, open_source
from maestri.shards.shard_set import ShardSet

LEARNT = 20_000
"""Training images of a run at most: scikit-learn takes minutes for more."""
K = (10, 20)
TEMPERATURE = 0.07
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
MAX_STEPS = 300
Set = tuple[Tensor, Tensor, Tensor, Tensor]
"""Features and labels to learn from, and features and labels to classify."""


def digits() -> Set:
    """Returns pixels of scikit-learn's digits, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    pixels, classes = torch.from_numpy(images[order]).float(), torch.from_numpy(labels[order])
    return pixels[:1200], classes[:1200], pixels[1200:], classes[1200:]


def student(run: Path) -> Iterator[tuple[str, Set]]:
    """Yields features of a run's student by pooling."""
    source = open_source(run, torch.device("cpu"))
    images = ImageSettings(
        size=source.size,
        crop_fraction=source.crop_fraction,
        batch_size=source.batch_size,
        num_threads=source.num_threads,
        device=torch.device("cpu"),
        executor=source.executor,
    )
    models = {STUDENT: source.models[STUDENT]}
    found = []
    for shards in (source.shards, source.test_shards):
        with ShardSet.open(shards) as shard_set:
            rows = np.arange(len(shard_set))
            table = cached_features(models, shard_set, rows, images, FeatureCache(source.home / "features"))[STUDENT]
            found.append((table, torch.from_numpy(shard_set.label(rows))))
    (train, labels), (test, answers) = found
    for pooling in train:
        yield f"{run.name}, {pooling}", (train[pooling][:LEARNT], labels[:LEARNT], test[pooling], answers)


def knn_rows(name: str, images: Set) -> Iterator[tuple[str, ...]]:
    """Yields k-NN's accuracies, ours and scikit-learn's."""
    start = time.monotonic()
    ours = knn_accuracy(*images, k=K, temperature=TEMPERATURE)
    seconds = time.monotonic() - start
    train, labels, test, answers = (values.numpy() for values in images)
    for k in K:
        start = time.monotonic()
        theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(train, labels)
        percent = 100 * theirs.score(test, answers)
        cells = f"{ours[k]:.2f}", f"{percent:.2f}", f"{ours[k] - percent:+.2f}"
        yield f"k-NN, k = {k}", name, *cells, f"{seconds:.0f}", f"{time.monotonic() - start:.0f}"


def weights(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the weights of neighbours' votes."""
    return np.exp((1 - distances) / TEMPERATURE)


def linear_row(name: str, images: Set) -> tuple[str, ...]:
    """Returns the accuracies of the best probe and of the best regression."""
    train, labels, test, answers = images
    settings = LinearSettings()
    start = time.monotonic()
    probes = train_probes(train, labels, num_classes=10, rates=settings.rates, epochs=settings.epochs, seed=0)
    ours, rate = max(zip(probes.accuracy(test, answers), settings.rates, strict=True))
    seconds = time.monotonic() - start
    start = time.monotonic()
    scaler = StandardScaler().fit(train)
    theirs = []
    for kind, learn, classify in (
        ("plain", train.numpy(), test.numpy()),
        ("standardised", scaler.transform(train), scaler.transform(test)),
    ):
        for strength in STRENGTHS:
            fit = LogisticRegression(C=strength, max_iter=MAX_STEPS).fit(learn, labels)
            theirs.append((100 * fit.score(classify, answers), kind, strength))
    best, kind, strength = max(theirs)
    cells = f"{ours:.2f} (rate {rate:g})", f"{best:.2f} ({kind}, C {strength:g})", f"{ours - best:+.2f}"
    return "linear", name, *cells, f"{seconds:.0f}", f"{time.monotonic() - start:.0f}"


def main(runs: list[str]) -> int:
    """Prints a Markdown table and returns 0; 1 if a figure is not reached."""
    sets = [("digits, pixels", digits()), *(of_run for run in runs for of_run in student(Path(run)))]
    rows: list[tuple[str, ...]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, images in track(sets, "comparing", transient=True, console=Console(stderr=True)):
            rows += [*knn_rows(name, images), linear_row(name, images)]
    print("| protocol | features | ours, % | scikit-learn, % | difference | seconds | scikit-learn's, all its fits |")
    print("|---|---|---:|---:|---:|---:|---:|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    missed = [row for row in rows if (float(row[4]) < -1 if row[0] == "linear" else abs(float(row[4])) > 0.05)]
    for row in missed:
        print(f"evaluation.py: {row[0]} on {row[1]} differs by {row[4]} points", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

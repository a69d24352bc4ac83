"""What every protocol works on and reports: images with features, and accuracies with what is chosen where.

Pooling and a setting (neighbours, rate, strength) and, for the headline, the model are chosen on held-out training
images.  Test images are classified once for every choice, and everything is reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from maestri.evals.features import Table

Setting = int | float
Accuracies = Mapping[str, Mapping[str, Mapping[Setting, float]]]
"""model → pooling → setting → percent."""
MEASURES = ("accuracy", "NMI", "ARI", "AMI")
"""Hungarian accuracy, normalised mutual information, adjusted Rand index and adjusted mutual information."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledFeatures:
    """Features of some images, and what is on them."""

    labels: Tensor
    """int64 ``sample``; none is missing."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """model → pooling → ``sample dim``; empty until they are read."""

    def part(self, rows: slice) -> "LabelledFeatures":
        """Returns some of the images."""
        tables = {name: {pooling: values[rows] for pooling, values in of.items()} for name, of in self.tables.items()}
        return LabelledFeatures(tables=tables, labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSets:
    """What a protocol is given."""

    train: LabelledFeatures
    """All training images, the held-out ones last."""
    num_held_out: int
    """Of the training images: those that choices are made on."""
    test: LabelledFeatures | None
    """Test images, if there are any."""
    class_names: tuple[str, ...]
    """By label."""
    device: torch.device = torch.device("cpu")
    """Where protocols that can compute on a GPU do so; features may lie elsewhere."""

    @property
    def bank(self) -> LabelledFeatures:
        """Training images without the held-out ones."""
        return self.train.part(slice(0, len(self.train.labels) - self.num_held_out))

    @property
    def held_out(self) -> LabelledFeatures | None:
        """Held-out training images; None without any."""
        if not self.num_held_out:
            return None
        return self.train.part(slice(len(self.train.labels) - self.num_held_out, None))

    @property
    def num_classes(self) -> int:
        """Classes, whether or not an image is of each."""
        return len(self.class_names)

    def tables(self) -> list[tuple[str, str]]:
        """Returns every model and pooling."""
        return [(model, pooling) for model, table in self.train.tables.items() for pooling in table]


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyReport:
    """Accuracies of every model, and the choices made on held-out training images."""

    setting: ClassVar[str]
    """What is chosen besides the pooling."""
    holdout: Accuracies = field(default_factory=dict)
    """On held-out training images; empty without any."""
    test: Accuracies = field(default_factory=dict)
    """On test images; empty without any."""

    def choice(self, model: str) -> tuple[str, Setting]:
        """Returns the pooling and setting that are best for a model on held-out images (on test images without any)."""
        table = (self.holdout or self.test)[model]
        return max(((pooling, at) for pooling in table for at in table[pooling]), key=lambda at: table[at[0]][at[1]])

    def chosen(self, model: str) -> float:
        """Returns a model's accuracy at its choice: on test images if there are any, else on held-out ones."""
        pooling, setting = self.choice(model)
        return (self.test or self.holdout)[model][pooling][setting]

    def best(self, models: tuple[str, ...]) -> str:
        """Returns the model that is best on held-out images, each at its own choice."""
        table = self.holdout or self.test

        def score(model: str) -> float:
            pooling, setting = self.choice(model)
            return table[model][pooling][setting]

        return max((model for model in models if model in table), key=score)

    def as_plain(self) -> dict[str, Any]:
        """Returns plain dicts for JSON; keys are strings."""
        return {
            split: {
                model: {pooling: {str(at): value for at, value in row.items()} for pooling, row in table.items()}
                for model, table in accuracies.items()
            }
            for split, accuracies in (("holdout", self.holdout), ("test", self.test))
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnReport(AccuracyReport):
    """k-NN's: settings are numbers of neighbours."""

    setting: ClassVar[str] = "k"


@dataclass(frozen=True, kw_only=True, slots=True)
class StrengthReport(AccuracyReport):
    """Means over splits of one kind: settings are scikit-learn's C."""

    setting: ClassVar[str] = "C"
    holdout_deviation: Accuracies = field(default_factory=dict)
    """Standard deviations over splits (n − 1), as ``holdout``; 0 for a single split."""
    test_deviation: Accuracies = field(default_factory=dict)
    """Likewise, as ``test``."""
    num_images: tuple[int, ...] = ()
    """Labelled images of each split."""


LowshotReport = Mapping[str, StrengthReport]
"""By kind of split: ``1-shot``, …, ``1 %``, or ``1,000 listed``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A measure over runs of k-means, in percent."""

    mean: float
    """Over runs."""
    deviation: float
    """Standard deviation over runs (n − 1); 0 for a single one."""
    lowest_inertia: float
    """Of the run whose images are nearest to their centres: what one would take without labels."""


Spreads = Mapping[str, Mapping[str, Mapping[str, Spread]]]
"""model → pooling → measure → spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterReport(AccuracyReport):
    """Clusters': accuracies are Hungarian, means over runs; the setting is the number of clusters."""

    setting: ClassVar[str] = "clusters"
    holdout_measures: Spreads = field(default_factory=dict)
    """All measures on held-out training images; empty without any."""
    test_measures: Spreads = field(default_factory=dict)
    """All measures on test images; empty without any."""

"""The configuration of a run: assembled here from the sections of each room."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from maestri.model.build import MethodConfig, check_views
from maestri.model.encoder import EncoderConfig
from maestri.model.method import ViewFacts
from maestri.pipelines.config import DataConfig
from maestri.pipelines.masks import num_hidden
from maestri.pipelines.views import ViewsConfig

MAY_CHANGE = (
    "out",
    "resume",
    "initial",  # a checkpoint holds all weights
    "checkpoint",
    "evaluation",
    "logging",
    "data.shards",  # the loader's state names the set itself, so only its folder may change
    "data.num_threads",
    "data.read_threads",
    "data.prefetch",
    "data.max_bad",
    "data.timeout",
    "data.test_shards",
    "engine.zero_stage",
    "engine.device",
    "engine.threads",
    "engine.compile",
    "engine.activation_checkpointing",
    "engine.offload",
    "engine.max_skipped",
    "engine.check_gradients",
    "engine.collect_every",
    "engine.timeout_minutes",
)
"""Fields and sections that a resumed run may have otherwise: none of them changes what is computed, beyond rounding."""


def _at_least(section: str, config: Any, lowest: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < lowest:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}; it must be at least {lowest}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How many images an optimizer step sees."""

    global_size: int = 1024
    """Images per optimizer step, over all ranks and accumulated micro-batches."""
    accumulation: int = 1
    """Micro-batches per optimizer step; statistics across a batch (assignments, ME-MAX) span one micro-batch."""

    def __post_init__(self) -> None:
        _at_least("batch", self, 1, "global_size", "accumulation")
        if self.global_size % self.accumulation:
            raise ValueError(
                f"batch.global_size is {self.global_size}; it must be a multiple of batch.accumulation "
                f"({self.accumulation})"
            )

    @property
    def micro_size(self) -> int:
        """Images per micro-batch, over all ranks."""
        return self.global_size // self.accumulation


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    base_lr: float = 5e-4
    """Peak learning rate at 256 images per optimizer step; it grows linearly with ``batch.global_size``."""
    min_lr: float = 1e-6
    """Learning rate at the end of the run, not scaled."""
    warmup: float = 0.05
    """Linear warm-up: a fraction of the run below 1, optimizer steps from 1 on."""
    weight_decay: float = 0.05
    """Decoupled weight decay at the first step; none on biases, norms, tokens, positions and prototypes."""
    weight_decay_end: float | None = None
    """Weight decay at the end of the run, reached along half a cosine; as at the first step when not set."""
    head_weight_decay: float | None = None
    """Weight decay, constant, of what stands outside of the encoder; as the encoder's when not set."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a layer to the one below it: patches and tokens, the encoder's blocks, and, at
    the full rate, its last norm and what stands behind it."""
    head_lr_scale: float = 1.0
    """Factor of the learning rate of what stands outside of the encoder."""
    freeze_prototypes: float = 0.0
    """How long prototypes keep their first weights: a fraction of the run below 1, optimizer steps from 1 on."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of first and second moments."""
    eps: float = 1e-8
    """AdamW's denominator offset."""
    clip: float = 0.0
    """Largest norm of the whole gradient; 0 = no clipping."""

    def __post_init__(self) -> None:
        _at_least("optimizer", self, 0, "base_lr", "min_lr", "warmup", "weight_decay", "freeze_prototypes", "clip")
        _at_least("optimizer", self, 0, "head_lr_scale")
        for name in ("weight_decay_end", "head_weight_decay"):
            if getattr(self, name) is not None:
                _at_least("optimizer", self, 0, name)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay is {self.layer_decay}; it must lie in (0, 1]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {list(self.betas)}; both must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialConfig:
    """Weights that a run starts from, instead of drawn ones: the encoder's, and what else the method needs."""

    run: str = ""
    """Folder of a finished run, or of one of its checkpoints; empty: weights are drawn from ``seed``."""
    model: str = "student"
    """Whose weights: the student's, or a teacher's by its role."""
    file: str = ""
    """Instead of a run: a file of an encoder's weights (timm, MAE, DINO or ``maestri export``), .safetensors or of
    ``torch.save``."""

    def __post_init__(self) -> None:
        if self.run and self.file:
            raise ValueError(f"initial.run is {self.run} and initial.file is {self.file}; give one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Precision, device and what DeepSpeed partitions."""

    zero_stage: int = 1
    """What is partitioned over ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of student and teachers; master weights and teachers' averages are float32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; ``auto`` is CUDA if there is any."""
    threads: int = 0
    """torch's CPU threads per rank; 0 = torch's own choice."""
    compile: bool = False
    """Whether torch compiles the transformer blocks of student and teachers."""
    activation_checkpointing: bool = False
    """Whether the student's blocks run again in the backward pass instead of keeping what they computed."""
    offload: Literal["nothing", "optimizer"] = "nothing"
    """What lies and is updated in the host's memory: master weights, moments and teachers' averages; ZeRO 1 to 3."""
    max_skipped: int = 10
    """Optimizer steps that may be skipped for a loss that is not finite, before the run ends."""
    check_gradients: bool = False
    """Whether a step is also skipped where the loss is finite and a gradient is not; then each waits for the device."""
    collect_every: int = 100
    """Optimizer steps between Python's garbage collections, on all ranks at once; 0 = whenever Python likes."""
    timeout_minutes: float = 10.0
    """A collective that waits longer than this for another rank fails."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("engine.offload is optimizer, which needs engine.zero_stage 1, 2 or 3, not 0")
        _at_least("engine", self, 0, "threads", "max_skipped", "collect_every")
        if self.timeout_minutes <= 0:
            raise ValueError(f"engine.timeout_minutes is {self.timeout_minutes}; it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written; one always is at the end, and on SIGTERM or SIGINT."""

    every: int = 500
    """Optimizer steps between checkpoints; 0 = only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints after each multiple of so many optimizer steps are kept for good; 0 = none is."""

    def __post_init__(self) -> None:
        _at_least("checkpoint", self, 0, "every", "keep_every")
        _at_least("checkpoint", self, 1, "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """k-NN on frozen features of the student and each teacher; ``maestri eval`` has more."""

    every: int = 0
    """Optimizer steps between evaluations during training; 0 = only before the first step and after the last."""
    k: tuple[int, ...] = (20,)
    """Neighbours that vote."""
    temperature: float = 0.07
    """Temperature of the votes' weights."""
    train_images: int = 0
    """Neighbours at most while training, the first of ``data.shards``; 0 = all images trained on, as at the end."""
    test_images: int = 0
    """Held-out images classified at most while training; 0 = all, as at the end."""
    full_at_end: bool = True
    """Whether the last evaluation has all neighbours and classifies all held-out and test images; False: it is as those
    before it, for a run that is judged afterwards."""
    crop_fraction: float = 0.875
    """Side of the centre crop as a fraction of the shorter side: 0.875 is 224 of 256; 1 for small images."""
    baselines: bool = True
    """Whether raw pixels and the untrained network are judged too, at the end of the run."""
    batch_size: int = 256
    """Images per forward pass, on each rank."""

    def __post_init__(self) -> None:
        _at_least("evaluation", self, 0, "every", "train_images", "test_images")
        _at_least("evaluation", self, 1, "batch_size")
        if not self.k or min(self.k) < 1:
            raise ValueError(f"evaluation.k is {list(self.k)}; give at least one number of neighbours, each at least 1")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"evaluation.crop_fraction is {self.crop_fraction}; it must lie in (0, 1]")
        if self.temperature <= 0:
            raise ValueError(f"evaluation.temperature is {self.temperature}; it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What is written and shown while training."""

    every: int = 20
    """Optimizer steps a row of metrics is the mean of; ranks and device are synchronised this often."""
    tensorboard: bool = True
    """Whether metrics are also written for TensorBoard."""
    wandb: str = ""
    """Project at Weights & Biases where metrics are also sent; empty = nowhere.  Needs the package wandb."""
    verbose: bool = False
    """Whether the libraries' own notes and warnings are shown."""

    def __post_init__(self) -> None:
        _at_least("logging", self, 1, "every")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that defines a run."""

    out: str = ""
    """Folder of the run: configuration, metrics, checkpoints, pictures."""
    resume: Literal["auto", "never"] = "auto"
    """``auto`` continues the run found in ``out``; ``never`` starts over and discards that run's checkpoints."""
    seed: int = 0
    """Of weights, order, views and masks."""
    steps: int = 10_000
    """Optimizer steps of the whole run; every schedule ends with it."""
    data: DataConfig
    """Where samples come from."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Crops, flips and masks."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The network that is trained."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """What it is trained for."""
    initial: InitialConfig = field(default_factory=InitialConfig)
    """Where training starts."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Batch sizes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed and the device."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation during training."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics and display."""

    def __post_init__(self) -> None:
        _at_least("run", self, 1, "steps")
        _at_least("run", self, 0, "seed")
        views, patch = self.views, self.encoder.patch
        for name, size in (("size", views.size), *((("local.size", views.local.size),) if views.local.count else ())):
            if size % patch:
                raise ValueError(f"views.{name} is {size}; it must be a multiple of encoder.patch ({patch})")
        hidden = num_hidden(views.mask.ratio, (views.size // patch) ** 2) if views.mask.constant_count else None
        check_views(
            self.method,
            ViewFacts(
                num_views=views.count,
                num_local=views.local.count,
                num_masked=hidden,
                corrupted=views.corruption.corrupts,
                aligned=views.corruption.align,
                micro_size=self.batch.micro_size,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """How a run's settings differ from those of its checkpoint, each as ``section.field (old → new)``."""

    refused: list[str]
    """Of fields that decide what is computed."""
    allowed: list[str]
    """Of others, but for the run's folder and ``resume``."""


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Returns what differs between two configurations, as ``as_plain`` gives them."""
    refused, allowed = [], []
    for path, was, now in _differences(old, new):
        sections = [path.rsplit(".", cut)[0] for cut in range(path.count(".") + 1)]
        if not set(MAY_CHANGE) & set(sections):
            refused.append(f"{path} ({was} → {now})")
        elif path not in ("out", "resume"):
            allowed.append(f"{path} ({was} → {now})")
    return Changes(refused=refused, allowed=allowed)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}", was, now


def as_plain(config: Any) -> dict[str, Any]:
    """Returns a dataclass as nested dicts of plain values, tuples as lists, as YAML and JSON store them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    plain_dict: dict[str, Any] = plain(dataclasses.asdict(config))
    return plain_dict

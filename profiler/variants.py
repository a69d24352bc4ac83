"""PL-MAE with two teachers, one or none, ready to train on a batch that stays."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestri.engine import distributed
from maestri.engine.config import RunConfig
from maestri.engine.distributed import Ranks
from maestri.engine.finite import FiniteGuard
from maestri.engine.schedules import scheduled
from maestri.engine.start import COMPUTE_DTYPES, start_engine
from maestri.engine.step import set_schedules, train_step
from maestri.engine.teachers import prepare_teachers
from maestri.model.build import build_method
from maestri.model.method import Method, Teacher
from maestri.pipelines.batch import Batch
from maestri.profiler.flops import FlopCounter
from maestri.profiler.memory import bytes_by_owner
from maestri.profiler.parts import parts_of
from maestri.profiler.resident import repeated

VARIANTS = ("none", "one", "two")
"""Numbers of teachers, by the name of the variant."""


class Replayed:
    """A method's student and loss with targets made once: no teacher runs, and none is averaged."""

    inherits: tuple[str, ...] = ()

    def __init__(self, method: Method, targets: Mapping[str, Tensor]) -> None:
        self.student = method.student
        self.teachers: Mapping[str, Teacher] = {}
        self.state = nn.Module()
        self._method = method
        self._targets = targets

    def targets(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Returns the same targets each time."""
        return self._targets

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns the method's own loss."""
        return self._method.loss(outputs, targets, step)

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the method's own figures."""
        return self._method.monitors(outputs, targets)

    def commit(self) -> None:
        """Does nothing: there is no state."""

    def rollback(self) -> None:
        """Does nothing: there is no state."""


class Variant:
    """A student in its engine, with so many teachers, and the optimizer steps that it has made."""

    def __init__(self, name: str, config: RunConfig, batch: Batch, ranks: Ranks, *, folder: Path) -> None:
        """Builds it; every rank must call it.

        Args:
            name: one of ``VARIANTS``.
            config: of a run of PL-MAE.
            batch: what it is trained on.
            folder: where steps whose loss is not finite would be written down.
        """
        plmae = replace(config.method.plmae, teachers="one" if name == "one" else "two")
        method = build_method(
            replace(config.method, plmae=plmae),
            config.encoder,
            image_size=config.views.size,
            num_steps=config.steps,
            seed=config.seed,
        )
        distributed.seed_everything(config.seed + 1 + ranks.rank)
        if name == "none":
            method = _replayed(method, batch, ranks.device, COMPUTE_DTYPES[config.engine.precision])
        before = _allocated(ranks.device)
        self.name = name
        self._engine, self._teachers, masters = start_engine(
            method, ranks, batch=config.batch, optimizer=config.optimizer, engine=config.engine
        )
        self._method = method
        self._config = config
        self._batches = repeated(batch)
        self._guard = FiniteGuard(
            ranks,
            folder=folder,
            budget=0,
            check_gradients=config.engine.check_gradients,
            keys_of=lambda rows: [str(row) for row in rows],
        )
        self._step = 0
        self.bytes = bytes_by_owner(self._engine.module, method, self._teachers, masters)
        """Kept between steps on this rank, by owner."""
        self.resident_bytes = _allocated(ranks.device) - before
        """Allocated on a GPU when it was built; 0 on a CPU."""

    def step(self) -> None:
        """Makes the next optimizer step, as the training loop does."""
        config = self._config
        settings = scheduled(config.optimizer, self._step, num_steps=config.steps, global_size=config.batch.global_size)
        set_schedules(self._engine, settings)
        train_step(self._engine, self._method, self._teachers, self._batches, self._step, guard=self._guard)
        self._step += 1

    def count_flops(self) -> dict[str, int]:
        """Makes a step, and returns this rank's FLOPs in it, by part."""
        # What torch has compiled is not seen by the counter.
        with torch.compiler.set_stance("force_eager"), FlopCounter(parts_of(self._method)) as counter:
            self.step()
        return counter.by_part

    def close(self) -> None:
        """Frees DeepSpeed's hooks."""
        self._engine.destroy()


def _replayed(method: Method, batch: Batch, device: torch.device, dtype: torch.dtype) -> Method:
    prepare_teachers(method, device=device, dtype=dtype)
    method.state.to(device)
    with torch.no_grad():
        targets = method.targets(batch, 0)
    for module in (method.state, *(teacher.module for teacher in method.teachers.values())):
        module.to("meta")  # which takes no memory
    return Replayed(method, targets)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def check_method(config: RunConfig) -> None:
    """Raises ValueError where a configuration is not of a method with one or two teachers."""
    if config.method.name != "plmae":
        raise ValueError(
            f"method.name is {config.method.name}; teachers are counted of plmae, which alone runs with one or two"
        )
    plmae: Any = config.method.plmae
    if not plmae.reconstruction.weight or not (plmae.class_level.weight or plmae.data_level.weight):
        raise ValueError(
            "method.plmae: a second teacher needs reconstruction.weight and one of class_level.weight and "
            "data_level.weight above 0"
        )

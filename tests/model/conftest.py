"""Small batches and encoders; programs run in one process and in two."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maestri.model.encoder import EncoderConfig
from maestri.pipelines.batch import Batch

SIZE, PATCH = 16, 4


@pytest.fixture
def encoder_config() -> EncoderConfig:
    return EncoderConfig(patch=PATCH, dim=32, depth=2, heads=4)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(*, batch: int = 4, views: int = 2, num_masked: int = 12, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (views, batch, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        order = torch.rand((views, batch, (SIZE // PATCH) ** 2), generator=generator).argsort(-1)
        masked, visible = order[..., :num_masked].sort(-1).values, order[..., num_masked:].sort(-1).values
        token_mask = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, masked, True)
        return Batch(
            views={"global": images},
            token_mask={"global": token_mask},
            visible={"global": visible},
            masked={"global": masked},
            labels=torch.full((batch,), -1),
            rows=torch.arange(batch),
            position=0,
        )

    return make


@pytest.fixture(scope="module")
def on_one_and_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Any, list[Any]]]:
    """Runs ``PROGRAM RANK WORLD STORE OUT`` on one rank and on two; returns what the one and each of the two saved."""

    def run(program: Path) -> tuple[Any, list[Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        runs = [
            subprocess.Popen(
                [sys.executable, program, str(rank), str(world), folder / f"store{world}", folder / f"w{world}"],
                env=environment,
            )
            for world in (1, 2)
            for rank in range(world)
        ]
        assert [process.wait(timeout=120) for process in runs] == [0, 0, 0]
        one = torch.load(folder / "w1.0", weights_only=True)
        return one, [torch.load(folder / f"w2.{rank}", weights_only=True) for rank in range(2)]

    return run

"""Small batches and encoders; programs run in one process and in two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from torch import Tensor, nn

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


@pytest.fixture
def draw_weights() -> Callable[[nn.Module, int], None]:
    """Fills a module's parameters, but for positions, in the order of their names: NumPy keeps RandomState's stream."""

    def draw(module: nn.Module, seed: int) -> None:
        stream = np.random.RandomState(seed)
        for name, parameter in sorted(module.named_parameters()):
            if "pos_embed" not in name:
                is_gain = "norm" in name and name.endswith("weight")
                values = 0.3 * stream.standard_normal(tuple(parameter.shape)) + is_gain
                parameter.data.copy_(torch.from_numpy(values))

    return draw


@pytest.fixture
def recorded_batch() -> Callable[..., tuple[Batch, Tensor]]:
    """A batch from RandomState's stream, and the noise ``view batch token`` by which MAE hides the highest tokens."""

    def make(*, views: int = 2, batch: int = 3, num_masked: int = 12) -> tuple[Batch, Tensor]:
        stream = np.random.RandomState(0)
        images = torch.from_numpy(stream.randint(0, 256, (views, batch, 3, SIZE, SIZE)).astype(np.uint8))
        noise = torch.from_numpy(stream.standard_normal((views, batch, (SIZE // PATCH) ** 2)))
        order, num_visible = noise.argsort(-1), noise.shape[-1] - num_masked
        masked = order[..., num_visible:].sort(-1).values
        made = Batch(
            views={"global": images},
            token_mask={"global": torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, masked, True)},
            visible={"global": order[..., :num_visible].sort(-1).values},
            masked={"global": masked},
            labels=torch.full((batch,), -1),
            rows=torch.arange(batch),
            position=0,
        )
        return made, noise

    return make


@pytest.fixture(scope="module")
def on_one_and_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Any, list[Any]]]:
    """Runs ``PROGRAM RANK WORLD STORE OUT`` on one rank and on two; returns what the one and each of the two saved."""

    def run(program: Path) -> tuple[Any, list[Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        runs = [
            warm_python.launch(
                [str(program), str(rank), str(world), str(folder / f"store{world}"), str(folder / f"w{world}")]
            )
            for world in (1, 2)
            for rank in range(world)
        ]
        done = warm_python.completed(runs, timeout=120)
        assert done.returncode == 0, done.stderr
        one = torch.load(folder / "w1.0", weights_only=True)
        return one, [torch.load(folder / f"w2.{rank}", weights_only=True) for rank in range(2)]

    return run

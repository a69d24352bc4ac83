"""Small batches and encoders."""

from collections.abc import Callable

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

"""The picture of views and masks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maestri.pipelines.config import DataConfig
from maestri.pipelines.loader import Loader
from maestri.pipelines.show import hidden_pixels, save_views_picture
from maestri.pipelines.views import GLOBAL, ViewsConfig


def test_hidden_pixels__patches() -> None:
    mask = torch.tensor([[True, False, False, True]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(hidden_pixels(mask, 4), expected[None])


def test_save_views_picture__tiles_are_views_and_masked_views(tiny_greys, tmp_path: Path) -> None:
    with Loader(
        tiny_greys,
        config=DataConfig(shards=""),
        views=ViewsConfig(size=28),
        patch=4,
        seed=0,
        rank=0,
        world_size=1,
        global_size=8,
        device=torch.device("cpu"),
    ) as loader:
        batch = next(loader)
    path = tmp_path / "views.png"
    save_views_picture(batch, path, num_samples=3)
    picture = np.array(Image.open(path))
    tile = 84 + 2
    assert picture.shape == (3 * tile, 4 * tile, 3)
    view = batch.views[GLOBAL][1, 2].permute(1, 2, 0).numpy()
    shown = picture[2 * tile : 2 * tile + 84 : 3, 2 * tile : 2 * tile + 84 : 3]
    assert np.array_equal(shown, view)
    masked = picture[2 * tile : 2 * tile + 84 : 3, 3 * tile : 3 * tile + 84 : 3]
    hidden = hidden_pixels(batch.token_mask[GLOBAL][1, 2], 28).numpy()
    assert (masked[hidden] == 128).all()
    assert np.array_equal(masked[~hidden], view[~hidden])

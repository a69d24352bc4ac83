"""Ranges of the data configuration."""

import pytest

from maestri.pipelines.config import DataConfig


@pytest.mark.parametrize("change", [{"holdout": -1}, {"num_threads": 0}, {"prefetch": 0}, {"max_bad": -1}])
def test_data_config__refuses(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"data.{next(iter(change))} is"):
        DataConfig(shards="", **change)

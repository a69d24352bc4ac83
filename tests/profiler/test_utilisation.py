"""How much of the machine a running job uses."""

from pathlib import Path

import pytest
import torch

from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.engine.distributed import Ranks
from maestri.model.build import build_method
from maestri.profiler.flops import FlopCounter
from maestri.profiler.parts import parts_of
from maestri.profiler.resident import resident_batch
from maestri.profiler.utilisation import Utilisation, flops_per_image

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ("fashion_mnist_plmae", "fashion_mnist_ibot", "fashion_mnist_maect_tune", "fashion_mnist_msn")


def recipe(name: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", ["--out", "nowhere"])


@pytest.mark.parametrize("name", RECIPES)
def test_flops_per_image__is_what_a_real_step_computes(name: str) -> None:
    config = recipe(name)
    method = build_method(
        config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
    )
    for teacher in method.teachers.values():
        teacher.module.train(teacher.train_mode)
    batch = resident_batch(config.views, patch=config.encoder.patch, seed=0, positions=range(8), device=CPU)
    with FlopCounter(parts_of(method)) as counter:
        with torch.no_grad():
            targets = method.targets(batch, 0)
        method.loss(method.student(batch), targets, 0)[0].backward()
    # A share of what a micro-batch computes does not grow with its images: prototypes and queues are normalised once.
    assert flops_per_image(config) == pytest.approx(counter.total / 8, rel=0.02)


def test_utilisation__draws_nothing_from_the_generator_of_training() -> None:
    config = recipe("fashion_mnist_mae")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Utilisation(config, Ranks(rank=0, world_size=1, local_rank=0, device=CPU), flops_per_image(config)).row(1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_utilisation__rate_times_work_over_the_peak() -> None:
    config = recipe("fashion_mnist_mae")
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=CPU)
    found = Utilisation(config, ranks, flops=1e6)
    slow, fast = found.row(100.0), found.row(200.0)
    assert slow["utilisation"] > 0
    assert fast["utilisation"] == pytest.approx(2 * slow["utilisation"])
    assert 1e8 < slow["host_bytes"] < 1e12
    assert "device_bytes" not in slow

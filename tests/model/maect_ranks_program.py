"""Run by test_maect.py on one or two ranks: two micro-steps of MAE-CT on the same global micro-batches.

Usage: maect_ranks_program.py RANK WORLD_SIZE STORE OUT
"""

import sys

import torch
import torch.distributed as dist

from maestri.model.collectives import gather_over_ranks, sum_over_ranks
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.maect import Maect
from maestri.model.maect_config import MaectConfig
from maestri.model.staged import commit
from maestri.pipelines.batch import Batch

BATCH = 8


def steps(stage: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Returns losses and gradients, as the engine averages them over ranks, draws and the queue."""
    torch.manual_seed(0)
    config = MaectConfig(
        stage=stage,
        projector_hidden=24,
        projection=8,
        predictor_hidden=16,
        queue_size=2 * BATCH,
        top_k=1 if stage == "head" else 4,
    )
    encoder = build_encoder(EncoderConfig(patch=4, dim=16, depth=2, heads=2), image_size=16)
    method = Maect(encoder, config, seed=0)
    images = torch.randint(256, (2, 2, BATCH, 3, 16, 16), dtype=torch.uint8)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    found = {}
    for step in range(2):
        batch = Batch(
            views={"global": images[step][:, share]},
            token_mask={},
            visible={},
            masked={},
            labels=(torch.arange(BATCH) % 3)[share],
            rows=torch.arange(BATCH)[share],  # the same images again: the second look-up has to pass them over
            position=step * BATCH + share.start,
        )
        with torch.no_grad():
            targets = method.targets(batch, step)
        outputs = method.student(batch)
        loss, metrics = method.loss(outputs, targets, step)
        loss.backward()
        commit(method.state)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            found[f"{name} {step}"] = sum_over_ranks(value.clone()) / world_size
        found[f"draws {step}"] = gather_over_ranks(targets["draws"].T)
    found["neighbour_agreement"] = method.monitors(outputs, targets)["neighbour_agreement"]
    for name, parameter in method.student.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = sum_over_ranks(parameter.grad) / world_size
    return found | {f"queue {name}": value for name, value in method.queue.state_dict().items()}


def main(rank: int, world_size: int, store: str, out: str) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.save({stage: steps(stage, rank, world_size) for stage in ("head", "tune")}, f"{out}.{rank}")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

"""Run by test_contrast_ranks.py on one or two ranks: MoCo-v3 and MSN on the same global micro-batch.

Usage: contrast_ranks_program.py RANK WORLD_SIZE STORE OUT
"""

import sys

import torch
import torch.distributed as dist

from maestri.model.collectives import sum_over_ranks
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.method import Method
from maestri.model.mocov3 import Mocov3, Mocov3Config
from maestri.model.msn import Msn, MsnConfig
from maestri.pipelines.batch import Batch

BATCH = 8


def step(name: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Returns loss, metrics and gradients, as the engine averages them over ranks."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(patch=4, dim=16, depth=2, heads=2), image_size=16)
    method: Method
    if name == "mocov3":
        method = Mocov3(encoder, Mocov3Config(hidden=24, projection=8), num_steps=10)
    else:
        method = Msn(encoder, MsnConfig(hidden=24, projection=8, prototypes=12), num_steps=10)
    with torch.no_grad():  # a teacher of its own, and scores that differ
        for parameter in [*method.student.parameters(), *next(iter(method.teachers.values())).module.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    images = torch.randint(256, (2, BATCH, 3, 16, 16), dtype=torch.uint8)
    local = torch.randint(256, (2, BATCH, 3, 8, 8), dtype=torch.uint8)
    order = torch.rand(2, BATCH, 16).argsort(-1)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    batch = Batch(
        views={"global": images[:, share]} | ({} if name == "mocov3" else {"local": local[:, share]}),
        token_mask={},
        visible={"global": order[:, share, :12]},
        masked={"global": order[:, share, 12:]},
        labels=torch.full((BATCH,), -1)[share],
        rows=torch.arange(BATCH)[share],
        position=share.start,
    )
    with torch.no_grad():
        targets = method.targets(batch, 0)
    loss, metrics = method.loss(method.student(batch), targets, 0)
    loss.backward()
    averaged = {"loss": loss.detach(), **metrics}
    averaged |= {
        f"gradient of {key}": value.grad for key, value in method.student.named_parameters() if value.grad is not None
    }
    return {key: sum_over_ranks(value.clone()) / world_size for key, value in averaged.items()}


def main(rank: int, world_size: int, store: str, out: str) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.save({name: step(name, rank, world_size) for name in ("mocov3", "msn")}, f"{out}.{rank}")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

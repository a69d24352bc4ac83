"""Run by test_collectives.py on one or two ranks: labels, codes and ME-MAX of the same global micro-batch.

Usage: ranks_program.py RANK WORLD_SIZE PORT_FILE OUT
"""

import sys

import torch
import torch.distributed as dist

from maestri.model.assignment import Assigner, me_max, sinkhorn
from maestri.model.codebook import Codebook
from maestri.model.heads import standardised


def main(rank: int, world_size: int, store: str, out: str) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(0)
    share = slice(rank * 32 // world_size, (rank + 1) * 32 // world_size)
    scores = (torch.rand(32, 12, generator=generator) * 2 - 1)[share]
    tokens = torch.randn(2, 32, 5, 8, generator=generator)[:, share]

    center = Assigner("centring", num_prototypes=12)
    center.labels(scores, temperature=0.1)
    center.commit()
    codebook = Codebook(size=6, dim=8, reseed_every=2, num_positions=5)
    positions = torch.rand(2, 32, 5, generator=generator).argsort(-1)[:, share]
    for step in range(4):
        codes = codebook.assign(tokens, positions, step=step)
        codebook.commit()
    leaf = scores.clone().requires_grad_(True)
    spread = me_max(leaf, temperature=0.1)
    spread.backward()
    projection = tokens.clone().requires_grad_(True)
    standard = standardised(projection)
    standard.pow(3).mean().backward()
    result = {
        "sinkhorn": sinkhorn(scores, temperature=0.05),
        "center": center.center,
        "codebook": codebook.codes,
        "codes": codes,
        "me_max": spread.detach(),
        # The engine averages gradients over ranks.
        "standardised": standard.detach().transpose(0, 1),
        "standardised_gradient": projection.grad.transpose(0, 1) / world_size,
        "me_max_gradient": leaf.grad / world_size,
    }
    torch.save(result, f"{out}.{rank}")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

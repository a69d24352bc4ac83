"""Run by test_collectives.py on one or two ranks: labels, codes, ME-MAX and methods on one global micro-batch.

Usage: ranks_program.py RANK WORLD_SIZE PORT_FILE OUT
"""

import sys

import torch
import torch.distributed as dist

from maestri.model.assignment import Assigner, Balance, me_max, sinkhorn
from maestri.model.codebook import Codebook
from maestri.model.collectives import gather_over_ranks_with_gradient, sum_over_ranks
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.heads import HeadConfig, standardised
from maestri.model.ibot import Ibot, IbotConfig
from maestri.model.levels import LevelConfig
from maestri.model.maskcluster import Maskcluster, MaskclusterConfig
from maestri.model.method import Method
from maestri.model.staged import commit
from maestri.pipelines.batch import Batch


def maskcluster(class_balance: Balance, patch_balance: Balance, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Returns loss and gradients, as the engine averages them over ranks, and centres, by name."""

    def level(balance: Balance) -> LevelConfig:
        head = HeadConfig(hidden=16, layers=2, bottleneck=8, prototypes=12)
        return LevelConfig(head=head, balance=balance, me_max=0.5, sinkhorn_start="probabilities")

    torch.manual_seed(0)
    config = MaskclusterConfig(
        class_level=level(class_balance), patch_level=level(patch_balance), patch_positions="corrupted"
    )
    encoder = build_encoder(EncoderConfig(patch=4, dim=16, depth=1, heads=2), image_size=16)
    method = Maskcluster(encoder, config, num_steps=10)
    global_views, local = torch.randint(256, (3, 8, 3, 16, 16)), torch.randint(256, (2, 8, 3, 8, 8))
    # Unlike numbers of corrupted pixels on the ranks.
    pixels = torch.rand(2, 8, 16, 16) < torch.linspace(0.02, 0.5, 8).view(8, 1, 1)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    views = {"global": global_views[:2], "global_corrupted": global_views[1:], "local": local}
    tokens = pixels.view(2, 8, 4, 4, 4, 4).any(dim=5).any(dim=3).flatten(2)
    batch = Batch(
        views={name: pixel[:, share].to(torch.uint8) for name, pixel in views.items()},
        token_mask={"global": tokens[:, share]},
        pixel_mask={"global": pixels[:, share]},
        visible={},
        masked={},
        labels=torch.zeros(8)[share],
        rows=torch.arange(8)[share],
        position=0,
    )
    found = step_of(method, batch, world_size)
    return {f"maskcluster, {class_balance}: {name}": value for name, value in found.items()}


def ibot(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Returns loss and gradients, as the engine averages them over ranks, and centres, by name."""
    torch.manual_seed(0)
    level = LevelConfig(
        head=HeadConfig(hidden=16, layers=2, bottleneck=8, prototypes=12), balance="centring", me_max=0.5
    )
    encoder = build_encoder(EncoderConfig(patch=4, dim=16, depth=1, heads=2), image_size=16)
    method = Ibot(encoder, IbotConfig(class_level=level, patch_level=level), num_steps=10)
    views = {"global": torch.randint(256, (2, 8, 3, 16, 16)), "local": torch.randint(256, (3, 8, 3, 8, 8))}
    # One rank hides few tokens, the other many; some views hide none.
    hidden = torch.rand(2, 8, 16) < torch.tensor([0, 0, 0.1, 0.2, 0, 0.5, 0.6, 0.7])[:, None]
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    batch = Batch(
        views={name: pixel[:, share].to(torch.uint8) for name, pixel in views.items()},
        token_mask={"global": hidden[:, share]},
        visible={},
        masked={},
        labels=torch.zeros(8)[share],
        rows=torch.arange(8)[share],
        position=0,
    )
    return {f"ibot: {name}": value for name, value in step_of(method, batch, world_size).items()}


def step_of(method: Method, batch: Batch, world_size: int) -> dict[str, torch.Tensor]:
    """Returns loss, metrics and gradients, averaged over ranks, and centres, by name."""
    with torch.no_grad():
        targets = method.targets(batch, 0)
    loss, metrics = method.loss(method.student(batch), targets, 0)
    loss.backward()
    commit(method.state)
    gradients = {name: parameter.grad for name, parameter in method.student.named_parameters()}
    averaged = {"loss": loss.detach()} | metrics
    averaged |= {f"gradient of {name}": gradient for name, gradient in gradients.items() if gradient is not None}
    found = {name: sum_over_ranks(value) / world_size for name, value in averaged.items()}
    return found | {f"{name}_centre": buffer for name, buffer in method.state.named_buffers()}


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
    part = scores.clone().requires_grad_(True)
    gathered = gather_over_ranks_with_gradient(part)
    # A mean over this rank's samples, each against those of all.
    (scores @ gathered.T).pow(2).mean().backward()
    result = {
        "gathered": gathered.detach(),
        "gathered_gradient": part.grad / world_size,
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
    for balances in (("sinkhorn", "centring"), ("centring", "sinkhorn")):
        result |= maskcluster(*balances, rank, world_size)
    result |= ibot(rank, world_size)
    torch.save(result, f"{out}.{rank}")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

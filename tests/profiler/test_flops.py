"""FLOPs against formulas worked out by hand."""

from typing import Any

import pytest
import torch

from maestri.engine.spans import span
from maestri.model.decoder import DecoderConfig
from maestri.model.encoder import Encoder, EncoderConfig, build_encoder
from maestri.model.heads import HeadConfig
from maestri.model.levels import LevelConfig
from maestri.model.plmae import Plmae
from maestri.model.plmae_config import PlmaeConfig, ReconstructionConfig
from maestri.pipelines.masks import MaskConfig
from maestri.pipelines.views import ViewsConfig
from maestri.profiler.flops import FlopCounter
from maestri.profiler.parts import BACKWARD, UNNAMED, parts_of
from maestri.profiler.resident import resident_batch

VITS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
"""Width, depth and heads of ViT-S/16, B/16 and L/16."""
IMAGES = 2


def vit_flops(dim: int, depth: int, *, tokens: int, patch: int = 16, mlp_ratio: int = 4) -> tuple[int, int]:
    """Returns FLOPs of an image's patch embedding and of its blocks, forward; ``tokens`` without the class token.

    A token's queries, keys and values are 3 D² multiplications, its projection D², its MLP 2 · 4 D²; its scores with
    L tokens are L D, and the sum of their values L D.
    """
    length = tokens + 1
    embedding = 2 * tokens * 3 * patch**2 * dim
    block = 2 * length * ((4 + 2 * mlp_ratio) * dim**2 + 2 * length * dim)
    return embedding, depth * block


def count(encoder: Encoder, *, size: int, tokens: int) -> dict[str, int]:
    """Returns FLOPs by part of ``tokens`` tokens of ``IMAGES`` images, forward and backward."""
    device = encoder.cls_token.device if encoder.cls_token is not None else "cpu"
    images = torch.zeros(IMAGES, 3, size, size, dtype=torch.uint8, device=device)
    visible = torch.zeros(IMAGES, tokens, dtype=torch.int64, device=device)
    with FlopCounter({"encoder": [encoder]}) as counter:
        encoder(images, None if tokens == encoder.num_tokens else visible).sum().backward()
    assert counter.total == sum(counter.by_part.values())
    return counter.by_part


@pytest.mark.parametrize("tokens", [49, 196])
@pytest.mark.parametrize("size", VITS)
def test_flop_counter__vit_forward_and_backward(size: str, tokens: int) -> None:
    dim, depth, heads = VITS[size]
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(dim=dim, depth=depth, heads=heads), image_size=224)
    found = count(encoder, size=224, tokens=tokens)
    embedding, blocks = (IMAGES * flops for flops in vit_flops(dim, depth, tokens=tokens))
    assert found["encoder"] == pytest.approx(embedding + blocks, rel=0.01)
    # Each product has two gradients; that of the pixels is not needed.
    assert found["encoder" + BACKWARD] == pytest.approx(embedding + 2 * blocks, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_flop_counter__the_kernel_of_attention_makes_no_difference(fused: bool, dtype: torch.dtype) -> None:
    encoder = build_encoder(EncoderConfig(patch=4, dim=16, depth=2, heads=2), image_size=32).to(dtype)
    module: Any
    for module in encoder.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    embedding, blocks = (IMAGES * flops for flops in vit_flops(16, 2, tokens=64, patch=4))
    expected = {"encoder": embedding + blocks, "encoder" + BACKWARD: embedding + 2 * blocks}
    assert count(encoder, size=32, tokens=64) == expected


def test_flop_counter__parts_of_plmae() -> None:
    dim, codes, tokens, visible = 16, 24, 16, 4
    head = HeadConfig(hidden=20, layers=2, bottleneck=12, prototypes=10)
    level = LevelConfig(head=head)
    config = PlmaeConfig(
        class_level=level,
        data_level=level,
        decoder=DecoderConfig(dim=8, depth=1, heads=2),
        reconstruction=ReconstructionConfig(codes=codes),
    )
    encoder = EncoderConfig(patch=4, dim=dim, depth=2, heads=2)
    method = Plmae(build_encoder(encoder, image_size=16), config, num_steps=10, seed=0)
    views = ViewsConfig(size=16, count=2, mask=MaskConfig(ratio=0.75))
    batch = resident_batch(views, patch=4, seed=0, positions=range(IMAGES), device=torch.device("cpu"))
    with FlopCounter(parts_of(method)) as counter:
        with span("teachers"), torch.no_grad():
            targets = method.targets(batch, 0)
        with span("loss"):
            loss = method.loss(method.student(batch), targets, 0)[0]
        with span("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
    found, encoded = counter.by_part, 2 * IMAGES

    whole, seen = (
        tuple(encoded * flops for flops in vit_flops(dim, 2, tokens=number, patch=4)) for number in (tokens, visible)
    )
    of_head = 2 * (dim * 20 + 20 * 12 + 12 * 10)
    labelled = encoded * (1 + visible)
    decoder = 2 * (visible + 1) * dim * 8 + vit_flops(8, 1, tokens=tokens)[1] + 2 * (tokens - visible) * 8 * dim
    rebuilding = 2 * (tokens - visible) * dim * codes
    assert found["labelling_teacher"] == sum(whole) + labelled * of_head
    assert found["reconstruction_teacher"] == sum(whole)
    assert found["encoder"] == sum(seen)
    assert found["encoder" + BACKWARD] == seen[0] + 2 * seen[1]
    assert found["decoder"] == encoded * decoder
    assert found["decoder" + BACKWARD] == 2 * encoded * decoder
    assert found["heads"] == labelled * of_head + encoded * rebuilding
    assert found["heads" + BACKWARD] == 2 * found["heads"]
    # Tokens against codes; three rounds of Sinkhorn of each, two products with a vector a round.
    hidden = encoded * (tokens - visible)
    assert found["teachers"] == 2 * hidden * dim * codes + 3 * 4 * (labelled * 10 + hidden * codes)
    assert UNNAMED not in found and "backward" not in found
    # Nothing of a counter stays behind.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in method.student.modules())

"""MAE's losses and gradients are those of the authors' code.

The recorded values are what facebookresearch/mae at commit efb2a8062c206524e35e47d04501ed4f544c0ae8 gives:
``MaskedAutoencoderViT.forward`` (models_mae.py; mask_ratio = 0.75, without and with ``norm_pix_loss``) for the weights,
images and noise of the fixtures, in float32, with PyTorch 2.15 and timm 1.0.31 on a CPU.  It got images normalised by
ImageNet's mean and deviation.  Its patches have the channel last: the rows of its ``decoder_pred`` are those of our
``decoder.head`` in that order.
"""

import pytest

from maestri.model.decoder import DecoderConfig
from maestri.model.encoder import build_encoder
from maestri.model.mae import Mae, MaeConfig

LOSS = {True: 2.831716537475586, False: 3.3712594509124756}
GRADIENT_NORMS = {
    True: {
        "encoder.patch_embed.proj.weight": 0.684699535369873,
        "encoder.cls_token": 0.36010363698005676,
        "encoder.blocks.0.attn.qkv.weight": 0.7193406224250793,
        "decoder.mask_token": 0.9177785515785217,
        "decoder.embed.weight": 0.5978448390960693,
        "decoder.head.weight": 1.7316821813583374,
    },
    False: {
        "encoder.patch_embed.proj.weight": 0.6938619017601013,
        "encoder.cls_token": 0.35435718297958374,
        "encoder.blocks.0.attn.qkv.weight": 0.7235715389251709,
        "decoder.mask_token": 0.8740890622138977,
        "decoder.embed.weight": 0.5855163931846619,
        "decoder.head.weight": 1.684449315071106,
    },
}


@pytest.mark.parametrize("normalise_pixels", [True, False])
def test_loss__is_the_authors(encoder_config, recorded_batch, draw_weights, normalise_pixels):
    config = MaeConfig(decoder=DecoderConfig(dim=16, depth=2, heads=2), normalise_pixels=normalise_pixels)
    method = Mae(build_encoder(encoder_config, image_size=16), config)
    draw_weights(method.student, 1)
    batch, _ = recorded_batch()
    loss, _ = method.loss(method.student(batch), method.targets(batch, 0), 0)
    loss.backward()
    assert loss.item() == pytest.approx(LOSS[normalise_pixels], rel=1e-5)
    found = dict(method.student.named_parameters())
    for name, norm in GRADIENT_NORMS[normalise_pixels].items():
        assert found[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name

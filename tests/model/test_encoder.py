import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maestri.model.encoder import (
    EncoderConfig,
    PatchProjection,
    build_encoder,
    normalise,
    sincos_positions,
    take,
    to_patches,
)


def images(batch=3, size=16):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_forward__all_tokens_equals_timm(encoder_config):
    encoder = build_encoder(encoder_config, image_size=16).eval()
    theirs = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0, global_pool="token"
    ).eval()
    theirs.load_state_dict(encoder.state_dict())  # strict: the names are timm's
    pixels = images()
    scaled = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), theirs.forward_features(scaled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [4, 7, 8, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_patch_projection__is_the_convolution_whatever_the_memory_held(patch, dtype, tolerance):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 64, patch, patch)
    drawn = torch.get_rng_state()
    projection = PatchProjection.of(convolution)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert projection.weight is convolution.weight and list(projection.state_dict()) == ["weight", "bias"]
    pixels = torch.randn(16, 3, 4 * patch, 4 * patch)
    with torch.no_grad():
        expected = convolution(pixels).flatten(2).transpose(1, 2)
        projection.to(dtype)
        for size in (2**10, 2**16, 2**20):
            torch.full((size,), torch.nan, dtype=dtype)  # freed at once: what a kernel may read that it should not
            found = projection(to_patches(pixels, patch).to(dtype))
            torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_forward__every_index_equals_none(encoder_config):
    encoder = build_encoder(encoder_config, image_size=16).eval()
    index = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images(), index), encoder(images()))


def test_forward__hidden_pixels_change_nothing(encoder_config):
    encoder = build_encoder(encoder_config, image_size=16).eval()
    pixels, visible = images(), torch.tensor([[0, 5, 15]] * 3)
    changed = pixels.clone()
    changed[:, :, :4, 4:8] ^= 255  # patch 1, hidden
    seen = pixels.clone()
    seen[:, :, :4, :4] ^= 255  # patch 0, visible
    with torch.no_grad():
        before, after, other = (encoder(image, visible) for image in (pixels, changed, seen))
    assert before.shape == (3, 4, 32)
    assert torch.equal(before, after)
    assert not torch.allclose(before, other)


def test_forward__a_replaced_patch_keeps_its_position_and_nothing_else(encoder_config):
    encoder = build_encoder(encoder_config, image_size=16).eval()
    pixels, token = images(), torch.full((1, 1, 32), 0.5)
    changed = pixels.clone()
    changed[:, :, :4, 4:8] ^= 255  # patch 1
    first, second = torch.zeros(2, 3, 16, dtype=torch.bool)
    first[:, 1] = second[:, 2] = True
    with torch.no_grad():
        before, after = (encoder(image, replaced=first, mask_token=token) for image in (pixels, changed))
        elsewhere, whole = encoder(pixels, replaced=second, mask_token=token), encoder(pixels)
        none = encoder(pixels, replaced=torch.zeros_like(first), mask_token=token)
    assert torch.equal(before, after) and torch.equal(none, whole)
    assert not torch.allclose(before, whole) and not torch.allclose(before[:, 2], elsewhere[:, 3])


def test_to_patches__row_major():
    pixels = images()
    patches = to_patches(pixels, 4)
    assert patches.shape == (3, 16, 3, 4, 4)
    assert torch.equal(patches[1, 6], pixels[1, :, 4:8, 8:12])


def test_normalise__is_exact_in_float32_of_bytes():
    pixels = images()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels.double() / 255 - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    assert (normalise(pixels, dim=1) - expected).abs().max() < 1e-5


def test_take__selects_rows():
    tokens = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(
        take(tokens, torch.tensor([[2, 0], [3, 3]])), torch.stack([tokens[0, [2, 0]], tokens[1, [3, 3]]])
    )


def test_sincos_positions__follow_the_formula():
    table = sincos_positions(8, 3)
    row, column = 2, 1
    omega = [1.0, 10000**-0.5]
    expected = [fn(at * w) for at in (column, row) for fn in (torch.sin, torch.cos) for w in map(torch.tensor, omega)]
    torch.testing.assert_close(table[row * 3 + column], torch.stack(expected).float())


def test_build_encoder__fixed_positions_are_frozen_and_class_token_has_none(encoder_config):
    encoder = build_encoder(encoder_config, image_size=16)
    assert not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed[0, 0], torch.zeros(32))
    learned = EncoderConfig(patch=4, dim=32, depth=1, heads=4, position="learned")
    assert build_encoder(learned, image_size=16).pos_embed.requires_grad


def test_build_encoder__patch_must_divide_the_image(encoder_config):
    with pytest.raises(ValueError, match="multiple of encoder.patch"):
        build_encoder(encoder_config, image_size=30)


@pytest.mark.parametrize("wrong", [{"dim": 30}, {"heads": 5}, {"patch": 0}, {"depth": 0}, {"drop_path": 1.0}])
def test_encoder_config__rejects(wrong):
    with pytest.raises(ValueError, match="encoder."):
        EncoderConfig(**wrong)


def test_encoder__smaller_views_get_resampled_positions(encoder_config):
    encoder = build_encoder(encoder_config, image_size=16).eval()
    small = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert encoder(small).shape == (2, 1 + 4, 32)
    grid = encoder.pos_embed[:, 1:].view(1, 4, 4, -1)
    with torch.no_grad():
        encoder.pos_embed[:, 1:] = torch.ones_like(encoder.pos_embed[:, 1:])
    assert torch.allclose(encoder._patch_positions(2), torch.ones(1, 4, 32))
    assert grid.shape == (1, 4, 4, 32)


def test_encoder__learned_positions_get_gradient_from_smaller_views():
    config = EncoderConfig(patch=4, dim=32, depth=1, heads=2, position="learned")
    encoder = build_encoder(config, image_size=16)
    encoder(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)).square().sum().backward()
    assert encoder.pos_embed.grad[:, 1:].abs().sum() > 0

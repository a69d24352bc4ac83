import torch

from maestri.model.decoder import DecoderConfig
from maestri.model.encoder import build_encoder
from maestri.model.mae import Mae, MaeConfig

DECODER = DecoderConfig(dim=16, depth=1, heads=2)


def test_targets__are_normalised_hidden_pixels(encoder_config, make_batch):
    batch = make_batch()
    method = Mae(build_encoder(encoder_config, image_size=16), MaeConfig(decoder=DECODER))
    pixels = method.targets(batch, 0)["pixels"]
    assert pixels.shape == (8, 12, 3 * 16)
    token = int(batch.masked["global"][1, 2, 5])
    row, column = divmod(token, 4)
    patch = batch.views["global"][1, 2, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    expected = ((patch - mean.view(3, 1, 1)) / std.view(3, 1, 1)).flatten()
    expected = (expected - expected.mean()) / (expected.var() + 1e-6).sqrt()
    torch.testing.assert_close(pixels[1 * 4 + 2, 5].double(), expected, rtol=1e-4, atol=1e-4)


def test_loss__is_the_mean_square_over_hidden_pixels(encoder_config, make_batch):
    batch = make_batch()
    method = Mae(build_encoder(encoder_config, image_size=16), MaeConfig(decoder=DECODER))
    targets, outputs = method.targets(batch, 0), method.student(batch)
    loss, metrics = method.loss(outputs, targets, 0)
    torch.testing.assert_close(loss, ((outputs["pixels"] - targets["pixels"]) ** 2).mean())
    assert metrics["loss_reconstruction"] == loss and not metrics["loss_reconstruction"].requires_grad


def test_loss__falls_when_trained(encoder_config, make_batch):
    torch.manual_seed(0)
    method = Mae(build_encoder(encoder_config, image_size=16), MaeConfig(decoder=DECODER, normalise_pixels=False))
    batch = make_batch()
    optimizer = torch.optim.AdamW(method.student.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss, _ = method.loss(method.student(batch), method.targets(batch, step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

import pytest
import torch

from maestri.model.decoder import Decoder, DecoderConfig


def make_decoder():
    torch.manual_seed(0)
    return Decoder(DecoderConfig(dim=16, depth=1, heads=2), input_dim=8, output_dim=5, num_tokens=16).eval()


def test_forward__predictions_follow_the_order_of_masked():
    decoder = make_decoder()
    tokens, visible = torch.randn(2, 4, 8), torch.tensor([[0, 3, 9]] * 2)
    masked = torch.tensor([[1, 2, 4]] * 2)
    with torch.no_grad():
        forward, backward = decoder(tokens, visible, masked), decoder(tokens, visible, masked.flip(1))
    assert forward.shape == (2, 3, 5)
    torch.testing.assert_close(forward, backward.flip(1))


def test_forward__order_of_visible_tokens_does_not_matter():
    decoder = make_decoder()
    tokens, visible, masked = torch.randn(1, 4, 8), torch.tensor([[0, 3, 9]]), torch.tensor([[1, 2]])
    swapped = torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens, visible, masked), decoder(swapped, visible.flip(1), masked))


def test_forward__positions_matter():
    decoder = make_decoder()
    tokens, masked = torch.randn(1, 4, 8), torch.tensor([[1, 2]])
    with torch.no_grad():
        here, there = (decoder(tokens, torch.tensor([at]), masked) for at in ([0, 3, 9], [9, 3, 0]))
    assert not torch.allclose(here, there)


@pytest.mark.parametrize("wrong", [{"dim": 30}, {"depth": 0}, {"heads": 3}])
def test_decoder_config__rejects(wrong):
    with pytest.raises(ValueError, match="decoder."):
        DecoderConfig(**wrong)

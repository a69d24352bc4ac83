import pytest
import torch

from maestri.model.heads import Head, HeadConfig, standardised


def test_forward__cosine_similarities():
    head = Head(HeadConfig(hidden=16, layers=2, bottleneck=8, prototypes=6), input_dim=12)
    scores = head(torch.randn(5, 3, 12))
    assert scores.shape == (5, 3, 6)
    assert scores.abs().max() <= 1 + 1e-5


def test_forward__length_of_prototypes_does_not_matter():
    head = Head(HeadConfig(hidden=16, layers=1, bottleneck=8, prototypes=6), input_dim=12)
    tokens = torch.randn(5, 12)
    before = head(tokens)
    head.prototypes.data *= 7.0
    torch.testing.assert_close(head(tokens), before)


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"layers": 0}, {"prototypes": 1}])
def test_head_config__rejects(wrong):
    with pytest.raises(ValueError, match="head."):
        HeadConfig(**wrong)


def test_standardised__equals_batch_norm_without_affine():
    values = torch.randn(6, 5, 8) * 3 + 20
    expected = torch.nn.functional.batch_norm(values.flatten(0, 1), None, None, training=True, eps=1e-6)
    torch.testing.assert_close(standardised(values), expected.view(6, 5, 8), rtol=1e-4, atol=1e-4)


def test_forward__standardised_projections_ignore_what_all_samples_share():
    head = Head(HeadConfig(hidden=16, layers=1, bottleneck=8, prototypes=6, standardise=True), input_dim=12)
    tokens = torch.randn(32, 12)
    torch.testing.assert_close(head(tokens + 50.0), head(tokens), rtol=1e-3, atol=1e-3)

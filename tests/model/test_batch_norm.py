import torch
from torch import nn

from maestri.model.batch_norm import BatchNorm


def noise(*shape, seed=0, mean=3.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0 + mean


def pair(dim):
    own, other = BatchNorm(dim), nn.BatchNorm1d(dim)
    with torch.no_grad():
        for parameter, values in ((own.weight, noise(dim, seed=1)), (own.bias, noise(dim, seed=2))):
            parameter.copy_(values)
    other.load_state_dict(own.state_dict(), strict=False)
    return own, other.train()


def test_batch_norm__each_view_is_torchs_on_its_own():
    own, other = pair(6)
    values = noise(2, 16, 6).requires_grad_(True)
    same = values.detach().clone().requires_grad_(True)
    found, expected = own(values), torch.stack([other(view) for view in same])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = noise(2, 16, 6, seed=3)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(values.grad, same.grad, rtol=1e-4, atol=1e-4)
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(own, name).grad, getattr(other, name).grad, rtol=1e-5, atol=1e-4)


def test_batch_norm__without_affine_is_torchs_without():
    own, values = BatchNorm(6, affine=False), noise(2, 16, 6)
    assert not list(own.parameters())
    other = nn.BatchNorm1d(6, affine=False).train()
    torch.testing.assert_close(own(values), torch.stack([other(view) for view in values]), rtol=1e-5, atol=1e-5)
    assert own(values.bfloat16()).dtype == torch.bfloat16


def test_batch_norm__statistics_are_float32_in_bf16():
    own, _ = pair(4)
    # bf16 holds 8 bits: a sum of squares of 1000 ± 1 taken in it would be noise.
    values = (noise(1, 256, 4, mean=0.0).round() * 8 + 1000).bfloat16()
    found, expected = own.bfloat16()(values), own.float()(values.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_batch_norm__has_no_running_statistics_and_one_mode():
    own, _ = pair(4)
    values = noise(2, 8, 4)
    assert not list(own.buffers())
    assert torch.equal(own.train()(values), own.eval()(values))

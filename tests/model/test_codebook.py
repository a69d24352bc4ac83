import pytest
import torch

from maestri.model.codebook import Codebook


def clusters(num=4, dim=16, views=2, batch=32, tokens=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num, dim, generator=torch.Generator().manual_seed(99)) * 3
    which = torch.randint(num, (views, batch, tokens), generator=generator)
    return centres[which] + 0.1 * torch.randn(views, batch, tokens, dim, generator=generator), which


def assign(codebook, tokens, step):
    positions = torch.arange(tokens.shape[2]).expand(tokens.shape[:3])
    return codebook.assign(tokens, positions, step=step)


def test_assign__finds_separated_clusters():
    codebook = Codebook(size=4, dim=16, momentum=0.8, seed=3)
    for step in range(64):
        assign(codebook, clusters(seed=step)[0], step)
        codebook.commit()
    tokens, which = clusters(seed=1000)
    codes = assign(codebook, tokens, 64)
    pure = [codes[which == label].bincount(minlength=4).max() / (which == label).sum() for label in range(4)]
    assert min(pure) > 0.95
    assert len({int(codes[which == label].mode().values) for label in range(4)}) == 4


def test_assign__leaves_state_alone_until_commit():
    codebook = Codebook(size=4, dim=16)
    assign(codebook, clusters()[0], 0)
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    codebook.rollback()
    codebook.commit()
    assert all(torch.equal(before[name], value) for name, value in codebook.state_dict().items())
    assign(codebook, clusters()[0], 1)
    codebook.commit()
    assert not torch.equal(before["codes"], codebook.codes)


def test_assign__frozen_codes_never_move():
    codebook = Codebook(size=4, dim=16, frozen=True)
    assign(codebook, clusters()[0], 0)
    before = codebook.codes.clone()
    for step in range(1, 20):
        assign(codebook, clusters(seed=step)[0], step)
        codebook.commit()
    assert torch.equal(before, codebook.codes)


def test_assign__reseeds_dead_codes():
    codebook = Codebook(size=8, dim=16, momentum=0.5, dead=0.01, reseed_every=4)
    assign(codebook, clusters()[0], 1)
    codebook.commit()
    codebook.codes[2] = -codebook.codes[0]
    codebook.counts[2], codebook.sums[2] = 1e-6, codebook.codes[2] * 1e-6
    tokens = clusters()[0]
    packed = torch.nn.functional.normalize(torch.nn.functional.layer_norm(tokens, (16,)), dim=-1).flatten(0, 2)
    codebook._stage(packed.view(tokens.shape), torch.zeros(len(packed), dtype=torch.int64), step=4)
    codebook.commit()
    assert codebook.counts[2] == 1.0
    assert (packed @ codebook.codes[2]).max() == pytest.approx(1.0, abs=1e-5)


def test_state__survives_a_round_trip():
    first = Codebook(size=4, dim=16)
    assign(first, clusters()[0], 0)
    first.commit()
    second = Codebook(size=4, dim=16, seed=5)
    second.load_state_dict(first.state_dict())
    tokens = clusters(seed=7)[0]
    assert torch.equal(assign(first, tokens, 1), assign(second, tokens, 1))


def test_assign__position_means_hide_where_a_token_is():
    tokens, which = clusters(tokens=4)
    places = torch.randn(4, 16, generator=torch.Generator().manual_seed(5)) * 30
    shuffled = torch.rand(tokens.shape[:3], generator=torch.Generator().manual_seed(6)).argsort(-1)
    purities = {}
    for num_positions in (0, 4):
        codebook = Codebook(size=4, dim=16, momentum=0.8, num_positions=num_positions)
        for step in range(64):
            codes = codebook.assign(tokens + places[shuffled], shuffled, step=step)
            codebook.commit()
        purities[num_positions] = sum(codes[which == at].bincount(minlength=4).max() for at in range(4)) / which.numel()
    assert purities[4] > 0.8 > purities[0]

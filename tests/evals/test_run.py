import torch
from torch import nn

from maestri.evals.run import _eval_mode


def test_eval_mode__gives_each_module_its_own_mode_back():
    encoder = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Dropout())
    encoder[0].eval()  # as frozen blocks are
    before = {name: module.training for name, module in encoder.named_modules()}
    assert before[""] and not before["0.0"] and before["1"]
    with _eval_mode({"student": encoder}):
        assert not any(module.training for module in encoder.modules())
        assert torch.equal(encoder(torch.ones(1, 2)), encoder(torch.ones(1, 2)))
    assert {name: module.training for name, module in encoder.named_modules()} == before

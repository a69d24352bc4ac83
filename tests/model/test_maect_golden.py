"""Two steps of MAE-CT, from pixels to gradients and queue, are those of the authors' code.

The recorded values are what ml-jku/MAE-CT at commit 6c82cb6ff79365e795672ea18a9051232ce53c24 gives: ``VitMae`` with
``NnclrHead`` (stage ``head``) and ``NnclrEmaQueueHead`` with three neighbours (``tune``), their ``get_loss``, for the
weights, images and queue below, in train mode, in float32, with PyTorch 2.15 and timm 1.0.31 on a CPU.  It got images
normalised by ImageNet's mean and deviation, the tokens detached under ``head``, and, for the random choice among
neighbours, the draws below.  Weights stay as they are between the steps.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maestri.model.encoder import build_encoder
from maestri.model.maect import Maect
from maestri.model.maect_config import MaectConfig
from maestri.model.staged import commit

# At the second step four images have been seen, two of them just before.
ROWS = [[3, 4, 40, 41, 42, 43, 44, 45], [40, 2, 41, 7, 8, 9, 44, 10]]
PREDICTOR, PROJECTOR, BLOCK = "predictor.3.weight", "projector.0.weight", "encoder.blocks.1.mlp.fc1.weight"
STEPS = {
    ("head", "mean"): [
        (2.6401119232177734, 4.411659240722656, {PREDICTOR: 1.5077335834503174, PROJECTOR: 4.470433235168457}),
        (2.5361409187316895, 10.388570785522461, {PREDICTOR: 0.8614771962165833, PROJECTOR: 1.2533183097839355}),
    ],
    ("head", "cls"): [
        (2.870265483856201, 5.045485496520996, {PREDICTOR: 1.8046095371246338, PROJECTOR: 3.5998878479003906}),
        (2.4732980728149414, 11.326955795288086, {PREDICTOR: 1.1522026062011719, PROJECTOR: 3.656008005142212}),
    ],
    ("tune", "mean"): [
        (
            2.5801119804382324,
            -8.023850440979004,
            {PREDICTOR: 1.5726873874664307, PROJECTOR: 3.0833005905151367, BLOCK: 1.8660573959350586},
        ),
        (
            2.3625049591064453,
            -15.259005546569824,
            {PREDICTOR: 1.1737228631973267, PROJECTOR: 0.9645518660545349, BLOCK: 0.5290549397468567},
        ),
    ],
}
"""By stage and pooling, for each step: the loss, the sum of the queue's entries after it, and norms of gradients."""


@pytest.mark.parametrize(("stage", "pooling"), STEPS)
def test_loss__is_the_authors(encoder_config, recorded_batch, draw_weights, stage, pooling):
    top_k = 3 if stage == "tune" else 1
    small = {"projector_hidden": 24, "projection": 8, "predictor_hidden": 16, "queue_size": 24}
    config = MaectConfig(stage=stage, pooling=pooling, top_k=top_k, **small)
    method = Maect(build_encoder(encoder_config, image_size=16), config, seed=0)
    draw_weights(method.student.train(), 1)
    if stage == "tune":
        draw_weights(method.teachers["projection_teacher"].module.train(), 2)
    stream = np.random.RandomState(3)
    method.queue.entries.copy_(F.normalize(torch.from_numpy(stream.standard_normal((24, 8))).float(), dim=-1))
    method.queue.rows.copy_(torch.arange(24) % 5)
    draws = torch.from_numpy(stream.randint(0, top_k, (2, 2, 8)))

    four_views, _ = recorded_batch(views=4, batch=8, num_masked=0)
    for step, (expected, queue, gradient_norms) in enumerate(STEPS[stage, pooling]):
        images = four_views.views["global"][2 * step : 2 * step + 2]
        batch = replace(four_views, views={"global": images}, rows=torch.tensor(ROWS[step]))
        method.student.zero_grad()
        targets = method.targets(batch, step) | {"draws": draws[step]}
        loss, _ = method.loss(method.student(batch), targets, step)
        loss.backward()
        commit(method.state)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert method.queue.entries.sum().item() == pytest.approx(queue, rel=1e-5)
        found = dict(method.student.named_parameters())
        for name, norm in gradient_norms.items():
            assert found[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name
    assert method.queue.rows.tolist() == ROWS[0] + ROWS[1] + [1, 2, 3, 4, 0, 1, 2, 3]

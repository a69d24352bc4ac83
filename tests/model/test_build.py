from typing import get_args, get_type_hints

import pytest
import torch

from maestri.model.build import MethodConfig, build_method, check_views
from maestri.model.decoder import DecoderConfig
from maestri.model.dino import DinoConfig
from maestri.model.heads import HeadConfig
from maestri.model.ibot import IbotConfig
from maestri.model.levels import LevelConfig
from maestri.model.mae import MaeConfig
from maestri.model.maect_config import MaectConfig
from maestri.model.maskcluster import MaskclusterConfig
from maestri.model.method import ViewFacts
from maestri.model.mocov3 import Mocov3Config
from maestri.model.msn import MsnConfig
from maestri.model.plmae_config import PlmaeConfig, ReconstructionConfig
from maestri.model.sdae import SdaeConfig

SMALL_HEAD = HeadConfig(hidden=16, layers=2, bottleneck=8, prototypes=8)
DECODER = DecoderConfig(dim=16, depth=1, heads=2)


def small(name):
    level = LevelConfig(head=SMALL_HEAD)
    plmae = PlmaeConfig(
        decoder=DECODER, class_level=level, data_level=level, reconstruction=ReconstructionConfig(codes=8)
    )
    maskcluster = MaskclusterConfig(class_level=level, patch_level=level)
    maect = MaectConfig(projector_hidden=8, projection=8, predictor_hidden=8, queue_size=8)
    return MethodConfig(
        name=name,
        plmae=plmae,
        mae=MaeConfig(decoder=DECODER),
        maskcluster=maskcluster,
        sdae=SdaeConfig(decoder=DECODER, update_every=1),
        maect=maect,
        dino=DinoConfig(class_level=level),
        ibot=IbotConfig(class_level=level, patch_level=level),
        mocov3=Mocov3Config(hidden=8, projection=8),
        msn=MsnConfig(hidden=8, projection=8, prototypes=8),
    )


NAMES = get_args(get_type_hints(MethodConfig)["name"])


@pytest.mark.parametrize("name", NAMES)
def test_build_method__every_name_builds_its_own(name, encoder_config):
    method = build_method(small(name), encoder_config, image_size=16, num_steps=10, seed=0)
    assert type(method).__name__.lower() == name


def test_build_method__weights_depend_on_the_seed_alone(encoder_config):
    torch.manual_seed(1)
    first = build_method(small("plmae"), encoder_config, image_size=16, num_steps=10, seed=0)
    before = torch.rand(())
    second = build_method(small("plmae"), encoder_config, image_size=16, num_steps=10, seed=0)
    third = build_method(small("plmae"), encoder_config, image_size=16, num_steps=10, seed=1)
    assert before != torch.rand(())
    assert all(map(torch.equal, first.student.state_dict().values(), second.student.state_dict().values()))
    assert not torch.equal(first.student.encoder.cls_token, third.student.encoder.cls_token)


@pytest.mark.parametrize(
    ("name", "views", "field"),
    [
        ("plmae", {"num_views": 1}, r"views\.count is 1"),
        ("mae", {"num_masked": 0}, r"views\.mask\.ratio"),
        ("mae", {"num_masked": None}, r"views\.mask\.spread"),
        ("sdae", {"num_masked": 2}, r"method\.sdae\.folds is 3"),
        ("mae", {"num_local": 2}, r"views\.local\.count is 2"),
        ("plmae", {"corrupted": True}, r"views\.corruption\.coverage"),
        ("maect", {"num_masked": 3}, r"views\.mask\.ratio"),
        ("maskcluster", {"corrupted": False}, r"views\.corruption\.coverage is 0"),
        ("dino", {"num_masked": 3}, r"views\.mask\.ratio"),
        ("ibot", {"num_masked": 0}, r"views\.mask\.ratio"),
        ("mocov3", {"num_masked": 3}, r"views\.mask\.ratio"),
        ("msn", {"num_views": 1}, r"views\.count is 1"),
    ],
)
def test_check_views__names_the_field(name, views, field):
    with pytest.raises(ValueError, match=field):
        check_views(MethodConfig(name=name), ViewFacts(**({"num_views": 2, "num_masked": 3} | views)))


def test_check_views__enough():
    check_views(MethodConfig(name="mae"), ViewFacts(num_views=1, num_masked=3))
    check_views(MethodConfig(name="sdae"), ViewFacts(num_views=1, num_masked=3))
    check_views(MethodConfig(name="plmae"), ViewFacts(num_views=2, num_masked=3))
    check_views(MethodConfig(name="maskcluster"), ViewFacts(num_views=2, num_local=10, corrupted=True, num_masked=None))
    check_views(MethodConfig(name="maect"), ViewFacts(num_views=2, num_masked=0))

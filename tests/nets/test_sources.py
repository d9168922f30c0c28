"""The networks of EDM and of guided diffusion against those that they come from."""

import pytest
import torch

from ds.nets import adm, adm_classifier, ddpmpp, ncsnpp
from tests.golden import networks


@torch.no_grad()
@pytest.mark.parametrize("name", networks.CASES)
def test_a_network_is_that_of_its_source(name):
    case = networks.CASES[name]
    x, t, cond = case.inputs()
    found = networks.fill(case.config.build())(x, t, **cond)
    expected = networks.outputs()[name]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # float32


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ddpmpp(), 55_733_891),
        (ddpmpp(classes=10), 55_735_299),
        (ddpmpp(augment_channels=0), 55_732_739),
        (ncsnpp(), 56_397_827),
        (ncsnpp(classes=10), 56_400_643),
        (ddpmpp(image_size=64, channel_mult=(1, 2, 2, 2)), 61_805_571),
        (ncsnpp(image_size=64, channel_mult=(1, 2, 2, 2)), 62_761_091),
        (adm.adm_imagenet64(), 295_899_267),
        (adm.adm_imagenet64(out_channels=6), 295_904_454),
        (adm.adm_imagenet128(), 421_529_606),
        (adm.adm_imagenet256(), 553_838_086),
        (adm.adm_imagenet256(classes=0), 552_814_086),
        (adm.adm_imagenet512(), 558_997_638),
        (adm.adm_lsun(), 552_814_086),
        (adm.adm_lsun(scale_shift=False, out_channels=None), 526_304_771),
        (adm_classifier(64), 65_438_568),
        (adm_classifier(128), 42_568_040),
        (adm_classifier(256), 54_096_360),
        (adm_classifier(512), 54_448_360),
    ],
    ids=lambda value: f"{value:,}" if isinstance(value, int) else type(value).__name__,
)
def test_a_published_network_has_its_size(config, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build().parameters()) == count

"""What each cell of a patch discriminator sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfkd_lib import models
from dfkd_lib.errors import InputError
from dfkd_lib.models.discriminators import Field

SIZES = {"patch1": 1, "patch2": 2, "patch4": 4, "patch5": 5, "patch8": 8, "patch10": 10, "patch15": 15, "patch18": 18,
         "patch22": 22, "patch46": 46}  # fmt: skip
MAPS = {"patch1": 32, "patch2": 33, "patch4": 18, "patch5": 16, "patch8": 8, "patch10": 8, "patch15": 4, "patch18": 8,
        "patch22": 4, "patch46": 2, "full": 1}  # fmt: skip


def discriminator(name: str, size: int = 32, ndf: int = 4, channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    shape = (channels, size, size)
    return models.build_discriminator(name, image_shape=shape, mean=[0.5] * channels, std=[0.25] * channels, ndf=ndf)


@pytest.mark.parametrize("name", models.discriminator_names())
def test_maps_have_the_published_sizes(name):
    assert discriminator(name)(torch.rand(2, 3, 32, 32)).shape == (2, 1, MAPS[name], MAPS[name])
    assert models.map_shape(discriminator(name), (3, 32, 32)) == (MAPS[name], MAPS[name])


@pytest.mark.parametrize("name", SIZES)
def test_a_cell_sees_its_window_and_nothing_else(name):
    """By the gradient of single cells, the network in eval mode: in train mode batch-norm couples everything."""
    size = 96 if name in ("patch22", "patch46") else 48
    network = discriminator(name, size).double().eval()
    field = models.receptive_field(network)
    assert field.size == SIZES[name]
    h, w = models.map_shape(network, (3, size, size))
    for i, j in ((h // 2, w // 2), (h // 2, 0), (h - 1, w // 2)):
        x = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
        network(x)[0, 0, i, j].backward()
        rows, columns = (
            grad.nonzero().flatten() for grad in (x.grad.abs().sum((0, 1, 3)), x.grad.abs().sum((0, 1, 2)))
        )
        for at, seen in ((i, rows), (j, columns)):
            first = field.stride * at + field.offset
            window = [p for p in range(first, first + field.size) if 0 <= p < size]
            # The outer ring of patch4 sees nothing but padding.
            assert seen.tolist() == window or (name == "patch4" and not len(seen))


def test_the_paper_s_window_is_the_one_of_the_sheet():
    assert models.receptive_field(discriminator("patch10")) == Field(size=10, stride=4, offset=-3)
    assert models.receptive_field(discriminator("patch22")) == Field(size=22, stride=8, offset=-7)


def test_in_train_mode_batch_norm_couples_all_cells():
    x = torch.rand(2, 3, 48, 48, requires_grad=True)
    discriminator("patch10", 48)(x)[0, 0, 6, 6].backward()
    assert x.grad[1].abs().sum() > 0 and x.grad[0, :, 0].abs().sum() > 0


def test_a_full_image_is_seen_by_one_cell():
    for size in (8, 32, 64):
        x = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
        d = discriminator("full", size).double().eval()(x)
        assert d.shape == (1, 1, 1, 1)
        d.sum().backward()
        assert (x.grad.abs().sum(1) > 0).all()
    wide = models.build_discriminator("full", image_shape=(1, 16, 24), mean=[0.5], std=[0.5], ndf=4)
    assert wide(torch.rand(2, 1, 16, 24)).shape == (2, 1, 1, 1)


def test_tiles_can_change_places_under_a_patch_discriminator():
    """Cells whose window lies in one quadrant move with it; a full-image discriminator has no such cell."""
    network = discriminator("patch10").double().eval()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    swapped = x.roll((16, 16), (2, 3))
    inner = torch.tensor([False, True, True, False] * 2)
    kept = inner[:, None] & inner[None]
    a, b = network(x)[0, 0].roll((4, 4), (0, 1)), network(swapped)[0, 0]
    same = torch.isclose(a, b, atol=1e-12)
    assert same[kept].all() and not same[~kept].all()
    full = discriminator("full").double().eval()
    assert not torch.isclose(full(x), full(swapped)).any()


def test_parameters_and_normalisation_are_the_published_ones():
    built = models.build_discriminator("patch10", image_shape=(3, 32, 32), mean=[0.4] * 3, std=[0.2] * 3)
    assert models.count_parameters(built) == 531_328
    assert round(models.count_macs(built, (3, 32, 32)) / 1e6, 1) == 35.1
    assert torch.allclose(built[0].mean, torch.tensor(0.4)) and torch.allclose(built[0].std, torch.tensor(0.2))
    convolutions = [m for m in built.modules() if isinstance(m, nn.Conv2d)]
    assert [c.bias is not None for c in convolutions] == [True, False, False]


def test_the_generators_are_the_papers():
    small = models.build_generator("toolbox_large", latent_dim=100, image_shape=(3, 32, 32), mean=[0] * 3, std=[1] * 3)
    assert round(models.count_parameters(small) / 1e6, 2) == 2.03
    assert round(models.count_macs(small, (100,)) / 1e6, 1) == 154.4
    large = models.build_generator("deep", latent_dim=100, image_shape=(3, 128, 64), mean=[0] * 3, std=[1] * 3, ngf=8)
    x = large(torch.randn(2, 100))
    assert x.shape == (2, 3, 128, 64) and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (("patch9", 32, 4), "patch8"),
        (("patch10", 32, 0), "ndf"),
        (("full", 3, 4), "from 4x4"),
        (("patch46", 8, 4), "8x8"),
    ],
)
def test_what_cannot_be_is_refused(asked, named):
    with pytest.raises(InputError, match=named):
        discriminator(*asked)

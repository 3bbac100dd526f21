"""The networks: sizes and costs as their papers give them, shapes, value ranges, and clear refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from dfkd_lib.errors import DataUnavailable, InputError
from dfkd_lib.models import (
    Denormalize,
    Normalize,
    build,
    build_generator,
    count_macs,
    count_parameters,
    generator_names,
    names,
)
from dfkd_lib.models.segmentation import InvertedResidual
from dfkd_lib.models.wide_resnet import PreActivationBlock

MEAN, STD = (0.49, 0.48, 0.45), (0.20, 0.21, 0.22)
CHEAP = [
    "lenet5_half",
    "resnet18",
    "wrn16_1",
    "vgg11",
    "digits_cnn",
    "scene_net_half",
    "deeplabv3_mobilenetv2",
]


def network(name: str, n_classes: int = 10, channels: int = 3, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return build(name, n_classes=n_classes, in_channels=channels, mean=MEAN[:channels], std=STD[:channels])


def generator(
    name: str, shape: tuple[int, int, int], latent_dim: int = 16, ngf: int = 4, device: str = "cpu"
) -> nn.Module:
    mean, std = MEAN[: shape[0]], STD[: shape[0]]
    with torch.device(device):
        return build_generator(name, latent_dim=latent_dim, image_shape=shape, mean=mean, std=std, ngf=ngf)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "shape", "n_classes", "parameters", "macs"),
    [
        # Printed by the papers or derived from their code, in the unit and rounding of the last digit given.
        ("lenet5", (1, 32, 32), 10, "61706", "0.42e6"),
        ("lenet5_half", (1, 32, 32), 10, "15738", "0.13e6"),
        ("lenet5_bn", (1, 32, 32), 10, "61848", "0.42e6"),  # twice 142 channels more, 142 biases less
        ("lenet5_bn_half", (1, 32, 32), 10, "15809", "0.13e6"),
        ("resnet34", (3, 32, 32), 10, "21.28e6", "1.159e9"),
        ("resnet18", (3, 32, 32), 10, "11.17e6", "0.555e9"),
        ("wrn40_2", (3, 32, 32), 10, "2.24e6", "328e6"),
        ("wrn40_1", (3, 32, 32), 10, "0.56e6", "83e6"),
        ("wrn16_2", (3, 32, 32), 10, "0.69e6", "101e6"),
        ("wrn16_1", (3, 32, 32), 10, "0.175e6", "27e6"),
        ("vgg11", (3, 32, 32), 10, "9.2e6", "209e6"),
        ("deeplabv3_resnet50", (3, 256, 256), 11, "39.6e6", "40.9e9"),
        # 5.21e9 if the 3x3 convolutions padded for themselves; padding before the expansion costs the rest.
        ("deeplabv3_mobilenetv2", (3, 256, 256), 11, "5.1e6", "5.45e9"),
    ],
)
def test_networks_have_the_published_size_and_cost(
    name: str, shape: tuple[int, int, int], n_classes: int, parameters: str, macs: str
) -> None:
    module = network(name, n_classes, shape[0], device="meta")
    assert rounded_like(count_parameters(module), parameters) == float(parameters)
    assert rounded_like(count_macs(module, shape), macs) == float(macs)


@pytest.mark.parametrize(
    ("name", "latent_dim", "shape", "parameters", "macs"),
    [
        ("generator_a", 100, (1, 32, 32), "1.05e6", "115e6"),
        ("generator_a", 256, (3, 32, 32), "2.33e6", "117e6"),
        ("generator_zskt", 100, (3, 32, 32), "1.5e6", "116e6"),
        ("generator_b", 256, (3, 128, 128), "11.2e6", "708e6"),
        ("toolbox_small", 256, (3, 32, 32), "2.33e6", "117e6"),
        ("toolbox_small", 256, (3, 64, 64), "8.6e6", "468e6"),
        ("toolbox_large", 256, (3, 32, 32), "4.6e6", "157e6"),
    ],
)
def test_generators_have_the_published_size_and_cost(
    name: str, latent_dim: int, shape: tuple[int, int, int], parameters: str, macs: str
) -> None:
    module = generator(name, shape, latent_dim, ngf=64, device="meta")
    assert rounded_like(count_parameters(module), parameters) == float(parameters)
    assert rounded_like(count_macs(module, (latent_dim,)), macs) == float(macs)


def rounded_like(value: int, printed: str) -> float:
    digits, _, exponent = printed.partition("e")
    unit = 10 ** int(exponent or 0)
    return float(f"{value / unit:.{len(digits.partition('.')[2])}f}") * unit


def test_counting_leaves_the_module_as_it_was() -> None:
    module = network("digits_cnn")
    before = copy.deepcopy(module.state_dict())
    assert count_macs(module, (3, 16, 16)) == 4 * count_macs(module, (3, 8, 8)) - 3 * 32 * 10
    assert module.training
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("name", names())
def test_networks_return_logits_at_every_size(name: str, size: int) -> None:
    x = torch.empty(2, 3, size, size, device="meta")
    module = network(name, n_classes=7, device="meta")
    assert isinstance(next(module.children()), Normalize)
    if name.startswith("lenet") and size != 32:
        with pytest.raises(InputError, match=rf"reads 32x32 images, not {size}x{size}; .*image_size=32"):
            module(x)
    else:
        assert module(x).shape == ((2, 7, size, size) if name in names("segmentation") else (2, 7))


def test_segmenters_answer_at_sizes_that_strides_do_not_divide() -> None:
    for name in names("segmentation"):
        x = torch.empty(2, 3, 45, 60, device="meta")
        assert network(name, n_classes=5, device="meta")(x).shape == (2, 5, 45, 60)


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "deeplabv3_mobilenetv2"])
def test_deeplab_backbones_have_output_stride_8(name: str) -> None:
    backbone = network(name, device="meta").get_submodule("network.backbone")
    assert backbone(torch.empty(2, 3, 64, 96, device="meta")).shape[2:] == (8, 12)


@pytest.mark.parametrize("name", names("classification"))
def test_classifiers_end_in_a_linear_layer_on_the_penultimate_features(name: str) -> None:
    module = network(name, device="meta")
    seen: list[Tensor] = []
    classifier = module.get_submodule("network.classifier")
    assert isinstance(classifier, nn.Linear)
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(torch.empty(2, 3, 32, 32, device="meta"))
    assert seen[0].shape == (2, classifier.in_features)


@pytest.mark.parametrize("name", CHEAP)
def test_every_weight_learns_and_the_images_stay_as_they_are(name: str) -> None:
    module = network(name)
    images = torch.rand(2, 3, 32, 32)
    x = images.clone().requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert torch.equal(x.detach(), images)
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", CHEAP)
def test_memory_format_does_not_change_the_logits(name: str) -> None:
    module = network(name).double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.double)
    plain = module(x)
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(module(x.contiguous(memory_format=torch.channels_last)), plain)


def test_modules_compile_as_one_graph() -> None:
    z, x = torch.randn(4, 16), torch.rand(4, 3, 32, 32)
    for module, batch in (
        (generator("generator_a", (3, 32, 32)), z),
        (network("lenet5_half"), x),
        (network("scene_net_half").eval(), x),
    ):
        module.eval()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(batch), module(batch))


def test_a_network_owns_its_normalisation() -> None:
    module = network("digits_cnn").eval()
    x = torch.rand(4, 3, 16, 16)
    by_hand = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(module.get_submodule("network")(by_hand), module(x))

    other = build("digits_cnn", n_classes=10, in_channels=3, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    assert not torch.allclose(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_denormalize_undoes_normalize() -> None:
    x = torch.rand(8, 3, 5, 5)
    normalize, denormalize = Normalize(MEAN, STD), Denormalize(MEAN, STD)
    torch.testing.assert_close(denormalize(normalize(x)), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(normalize(denormalize(x)), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 32, 48), (3, 64, 64), (3, 128, 128)])
@pytest.mark.parametrize("name", generator_names())
def test_generators_make_images_of_every_size(name: str, shape: tuple[int, int, int]) -> None:
    x = generator(name, shape)(torch.randn(4, 16))
    assert x.shape == (4, *shape)
    if name not in ("generator_a", "generator_dafl", "generator_zskt"):
        assert x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["generator_a", "generator_dafl", "generator_zskt"])
def test_generators_without_range_are_standardised_in_the_teachers_space(name: str, size: int) -> None:
    x = Normalize(MEAN, STD)(generator(name, (3, size, size))(torch.randn(64, 16)))
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-4
    assert (variance - 1).abs().max() < 1e-2


def test_generator_b_fills_the_image_range_and_starts_small() -> None:
    module = generator("generator_b", (3, 32, 32), ngf=16)
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert all(abs(layer.weight.std().item() - 0.02) < 2e-3 for layer in convolutions)
    last = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    assert last.bias is not None and not last.bias.any()
    with torch.no_grad():
        last.weight.mul_(1e4)
        x = module(torch.randn(8, 16))
    assert x.min() < 0.01 and x.max() > 0.99


@pytest.mark.parametrize("name", generator_names())
def test_ngf_scales_every_width(name: str) -> None:
    widths = []
    for ngf in (4, 12):
        module = generator(name, (3, 32, 32), ngf=ngf, device="meta")
        widths.append([m.num_features for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.affine])
    assert [3 * width for width in widths[0]] == widths[1]


def test_wide_resnet_shortcut_starts_from_the_activated_input() -> None:
    block = PreActivationBlock(4, 8, stride=2).eval()
    assert block.shortcut is not None
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(torch.relu(block.bn1(x))))
    same = PreActivationBlock(4, 4, stride=1).eval()
    nn.init.zeros_(same.conv2.weight)
    torch.testing.assert_close(same(x), x)


def test_inverted_residual_pads_before_it_expands() -> None:
    block = InvertedResidual(2, 4, stride=1, dilation=2, expansion=3).eval()
    norm = block.get_submodule("expand.1")
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.ones_(norm.bias)
    y = block(torch.zeros(1, 2, 6, 6))
    assert y.abs().max() > 0
    torch.testing.assert_close(y, y[:, :, 3:4, 3:4].expand_as(y))


def test_vgg_pools_once_more_at_64_pixels() -> None:
    module = network("vgg16", device="meta")
    seen: list[torch.Size] = []
    module.get_submodule("network.groups.4").register_forward_hook(lambda _, __, y: seen.append(y.shape[2:]))
    for size in (32, 64):
        module(torch.empty(2, 3, size, size, device="meta"))
    assert seen == [(4, 4), (4, 4)]


def test_names_are_grouped_by_task() -> None:
    assert set(names()) == set(names("classification")) | set(names("segmentation"))
    assert len(set(names())) == len(names())
    assert "lenet5" in names("classification") and "scene_net" in names("segmentation")
    with pytest.raises(InputError, match="unknown task 'segmentaton'; did you mean 'segmentation'"):
        names("segmentaton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet43"}, "unknown network 'resnet43'; did you mean 'resnet34'"),
        ({"name": "generator_a"}, "unknown network 'generator_a'"),
        ({"n_classes": 0}, "n_classes must be at least 1, not 0"),
        ({"in_channels": 1}, "mean has 3 values for 1 channels"),
        ({"std": (0.2, 0.2)}, "mean has 3 values and std 2"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be above 0"),
        ({"pretrained": True}, "'digits_cnn' has no pretrained weights; only deeplabv3_resnet50"),
    ],
)
def test_build_refuses_what_cannot_be(change: dict[str, object], message: str) -> None:
    arguments = {"name": "digits_cnn", "n_classes": 10, "in_channels": 3, "mean": MEAN, "std": STD} | change
    with pytest.raises(InputError, match=message) as caught:
        build(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "generator_c"}, "unknown generator 'generator_c'; did you mean 'generator_"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, not 0"),
        ({"ngf": 0}, "ngf must be at least 1, not 0"),
        ({"image_shape": (1, 32, 32)}, "mean has 3 values for 1 channels"),
        ({"image_shape": (3, 0, 32)}, "height must be at least 1, not 0"),
    ],
)
def test_build_generator_refuses_what_cannot_be(change: dict[str, object], message: str) -> None:
    arguments = {"name": "generator_a", "latent_dim": 8, "image_shape": (3, 32, 32), "mean": MEAN, "std": STD}
    with pytest.raises(InputError, match=message) as caught:
        build_generator(**(arguments | change))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", generator_names())
@pytest.mark.parametrize("size", [(1, 3), (9, 14), (29, 32)])
def test_a_generator_makes_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    """The middle of the next larger image that it can make, with every output still reached from the noise."""
    z = torch.randn(5, 8, requires_grad=True)
    module = build_generator(name, latent_dim=8, image_shape=(3, *size), mean=MEAN, std=STD, ngf=4)
    x = module(z)
    assert x.shape == (5, 3, *size) and x.is_contiguous()
    (gradient,) = torch.autograd.grad(x[..., 0, 0].sum() + x[..., -1, -1].square().sum(), z)
    assert gradient.abs().max() > 0


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: object) -> nn.Module:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models.resnet50", unreachable)
    with pytest.raises(DataUnavailable, match=r"ImageNet weights .*no route to host.*pretrained=False"):
        build("deeplabv3_resnet50", n_classes=11, in_channels=3, mean=MEAN, std=STD, pretrained=True)
    with pytest.raises(InputError, match="ImageNet weights read 3 channels, not 1"):
        build("deeplabv3_resnet50", n_classes=11, in_channels=1, mean=(0.5,), std=(0.5,), pretrained=True)


def test_importing_the_networks_does_not_import_torchvision() -> None:
    code = "import sys, dfkd_lib.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

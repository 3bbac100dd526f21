"""What a runtime chooses, what it refuses, and that seeds mean what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import classifier

from dfkd_lib.errors import InputError
from dfkd_lib.runtime import Runtime


def test_every_choice_can_be_overridden_and_is_told_in_one_line():
    runtime = Runtime.choose("cpu", "bfloat16", seed=7, channels_last=False, threads=1)
    line = runtime.describe()
    assert "\n" not in line
    for word in ("cpu", "bfloat16", "contiguous", "seed 7", "1 threads"):
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:99"}, "not present on this machine; here: cpu"),
        ({"device": "cpu", "precision": "bf16"}, "unknown precision 'bf16'; did you mean 'bfloat16'"),
        ({"device": "cpu", "precision": "float16"}, "for GPUs"),
        ({"device": "cpu", "threads": -1}, "threads"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Runtime.choose(**arguments)


def test_streams_follow_from_seed_and_name():
    def draw(seed: int, name: str) -> list[float]:
        runtime = Runtime.choose("cpu", "float32", seed=seed)
        return torch.rand(3, generator=runtime.stream(name)).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert len({tuple(draw(seed, name)) for seed in (0, 1) for name in ("a", "b")}) == 4


def test_prepared_networks_have_the_runs_type_and_layout():
    runtime = Runtime.choose("cpu", "bfloat16", channels_last=True)
    network = runtime.prepare(classifier())
    assert network[0].weight.dtype == torch.float32
    x = runtime.images(torch.rand(2, 1, 8, 8).expand(2, 1, 8, 8))
    assert x.is_contiguous(memory_format=torch.channels_last)
    with runtime.autocast():
        assert network(x).dtype == torch.bfloat16


def test_sixteen_bits_stay_near_float32():
    torch.manual_seed(0)
    network, x = classifier().eval(), torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        exact = network(x)
        with Runtime.choose("cpu", "bfloat16").autocast():
            near = network(x)
    assert torch.allclose(near.float(), exact, atol=0.05)


def test_only_float16_scales_gradients():
    assert not Runtime.choose("cpu", "bfloat16").scaler().is_enabled()


def test_importing_the_library_needs_no_jupyter_and_loads_nothing_heavy():
    hidden = ["IPython", "ipykernel", "jupyter_client", "nbformat", "nbclient", "papermill", "matplotlib", "pandas"]
    modules = "distilling teachers records methods.dfad training.fit training.kd reproduction.chapter reproduction.cli"
    modules += " reproduction.display reproduction.pages reproduction.plain reproduction.papers reproduction.plots"
    code = (
        f"import importlib, sys\nfor name in {hidden!r}: sys.modules[name] = None\n"
        f"for name in {modules.split()!r}: importlib.import_module('dfkd_lib.' + name)\n"
        "assert 'sklearn' not in sys.modules and 'torchvision' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_network_is_distilled_without_jupyter_matplotlib_or_pandas():
    hidden = ["IPython", "ipykernel", "jupyter_client", "nbformat", "nbclient", "papermill", "matplotlib", "pandas"]
    code = (
        f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\n"
        "import dfkd_lib\nfrom torch import nn\n"
        "net = lambda w: nn.Sequential(nn.Conv2d(1, w, 3), nn.BatchNorm2d(w), nn.Flatten(), nn.Linear(36 * w, 10))\n"
        "done = dfkd_lib.distill(net(4).eval(), net(2), 'dfad', image_shape=(1, 8, 8), num_classes=10, n_updates=2,\n"
        "                        batch_size=4, device='cpu', precision='float32', progress=False)\n"
        "print(done.budget.student_updates)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr

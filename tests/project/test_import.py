"""What `import fastcnn` and the first uses load: nothing heavy that torch has not loaded.

Modules are counted, not seconds. torch._dynamo alone brings 888 (torch 2.13).
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from fastcnn.common.constant_result import constant_result

HEAVY = [
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
]
# In a process of its own: this one has loaded everything.
CODE = """
import contextlib, io, json, sys, torch
from torch import nn
before = set(sys.modules)
loaded = lambda: sorted(set(sys.modules) - before)

import fastcnn
at_import = loaded()

x = torch.randn(2, 3, 32, 32)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Upsample(scale_factor=2.0))
fastcnn.create_model("resnet20")(x).sum().backward()
fastcnn.convert(net)
net(x).sum().backward()
with contextlib.redirect_stdout(io.StringIO()):
    fastcnn.report(net)
fastcnn.convert(net.eval(), mode="infer")
net(x)
fastcnn.revert(net)
fastcnn.nn.Dropout()(fastcnn.nn.GroupNormAct(1, 3)(x))
fastcnn.augment.Augment((32, 32))(torch.zeros(2, 3, 40, 40, dtype=torch.uint8))
print(json.dumps({"import": at_import, "first uses": loaded()}))
"""


def test_nothing_heavy_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    for when, loaded in json.loads(done.stdout).items():
        assert "fastcnn._C" in loaded
        assert not [name for name in HEAVY if name in loaded], when
        # Of other packages, as sympy, triton and matplotlib, nothing at all.
        expected = {"fastcnn", "torch", *sys.stdlib_module_names}
        assert not [name for name in loaded if name.split(".")[0] not in expected], when


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_modules_exist(name: str) -> None:
    # One that torch has renamed would never be found above.
    assert importlib.util.find_spec(name) is not None


def test_constant_result_does_what_torch_s_decorator_does() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert constant_result(ours) is ours
    assert torch.compiler.assume_constant_result(theirs) is theirs
    assert vars(ours) == vars(theirs)

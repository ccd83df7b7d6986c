"""What `import fastcnn` and the first uses load: nothing heavy that torch has not loaded.

Modules are counted, not seconds. torch._dynamo alone brings 888 (torch 2.13).
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

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


def copy_package(folder: Path) -> None:
    """Copy what `import fastcnn` needs up to its compiled part, without that."""
    (folder / "fastcnn").mkdir(parents=True)
    for name in ("__init__.py", "_version_check.py"):
        shutil.copy(ROOT / "fastcnn" / name, folder / "fastcnn")


def import_error(folder: Path) -> str:
    """Return what `import fastcnn` says in a folder, the last line."""
    # Without site-packages: an editable fastcnn would be found first.
    (folder / "torch.py").write_text("__version__ = '2.13.0'\n")
    command = [sys.executable, "-S", "-c", "import fastcnn"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_the_checkout_says_that_it_hides_the_installed_package(tmp_path: Path) -> None:
    checkout = tmp_path / "check out"
    copy_package(checkout)
    (checkout / "pyproject.toml").touch()
    said = import_error(checkout)
    assert said.startswith(
        f"ImportError: {checkout} is the source checkout of fastcnn, which hides"
    )
    assert "run Python from another folder" in said
    assert f"pip install --no-build-isolation -e '{checkout}'" in said


def test_a_package_without_its_compiled_part_says_for_which_python(tmp_path: Path) -> None:
    copy_package(tmp_path)
    said = import_error(tmp_path)
    assert f"compiled part {tmp_path / 'fastcnn' / '_C'} for {sys.implementation.cache_tag}" in said
    assert sys.executable in said


def test_a_compiled_part_that_does_not_load_says_why_itself(tmp_path: Path) -> None:
    copy_package(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "fastcnn/_C.so").write_text("no ELF file")
    said = import_error(tmp_path)
    assert "_C.so" in said
    assert "checkout" not in said

"""What compute-sanitizer is shown on a GPU: a call of every kernel, as the emulator sees them."""

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emu import library
from gpu.sanitize import kernels, triton_kernels
from support.device import HAS_GPU, on_gpu
from support.kernel_cases import CASES, run
from support.paths import TESTS
from triton.runtime import interpreter

AS_ON_A_GPU = """
from support import device, kernel_cases
with device.on_gpu():
    raise SystemExit(kernel_cases.run(["cuda"]))
"""

pytestmark = pytest.mark.skipif(HAS_GPU, reason="on a GPU make gpu asks the GPU itself")


def test_every_cuda_kernel_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a process of its own, since the library reads its environment when it is called; with the
    # multiprocessors of an H200, by which launchers choose between kernels.
    launched = tmp_path / "launched"
    monkeypatch.setenv("CUDA_EMU_LAUNCHED", f"{launched}")
    monkeypatch.setenv("CUDA_EMU_SMS", "132")
    subprocess.run([sys.executable, "-c", AS_ON_A_GPU], cwd=TESTS, check=True)
    symbols = subprocess.run(
        ["nm", "-C", library.build_library()], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    at = {
        int(words[0], 16): words[2]
        for words in (line.split(" ", 2) for line in symbols)
        if len(words) == 3 and words[0]
    }
    found = {at[int(line, 16)] for line in launched.read_text().split()}
    names = {name for name in kernels() if any(f"::{name}" in symbol for symbol in found)}
    assert names == kernels()


def test_every_triton_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    found, launch = set(), interpreter.GridExecutor.__call__

    def noted(self: interpreter.GridExecutor, *args: object, **kwargs: object) -> None:
        found.add(self.fn.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    with on_gpu():
        assert run(["triton"]) == 0
    assert found == triton_kernels()


def test_a_case_that_raises_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    cases = {"first": lambda: 1 / 0, "second": lambda: called.append(1)}
    monkeypatch.setitem(CASES, "cuda", cases)
    assert run(["cuda"]) == 1
    assert called

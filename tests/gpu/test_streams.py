"""Where kernels run: on PyTorch's current stream, in its order, without waiting for a device."""

import ctypes
import os

import pytest
import torch
from support.device import DEVICE, needs_gpu
from support.gpu_calls import CALLS, assert_equal, inputs, run
from support.seeds import seed_all
from torch import Tensor

from fastcnn.functional import batch_norm_act

pytestmark = [pytest.mark.gpu, needs_gpu]

# 0.5 s at a H200's 1.98 GHz: a call's part of the CPU takes milliseconds, and each of its waits for
# the GPU a turn of the processes that test beside it, which share it by time.
CYCLES = 1_000_000_000


@pytest.fixture(autouse=True)
def same_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's fastest weight gradients differ from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def run_seeded(name: str, late: list[Tensor], constant: list[Tensor]) -> list[Tensor]:
    seed_all(0)  # dropout draws its seed in the call
    return run(name, late, constant)


def warmed_up(name: str, constant: list[Tensor]) -> torch.cuda.Stream:
    """A stream on which a call has run, of other values: code is loaded, memory is there.

    Asking the device for memory would wait for it.
    """
    stream = torch.cuda.Stream()
    other, _ = inputs(name, 2)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run_seeded(name, other, constant)
    torch.cuda.synchronize()
    return stream


def dirty_free_memory() -> None:
    """Write NaN where the default stream's next tensors will lie."""
    for size in (512, 4096, 1 << 16, 1 << 20, 1 << 23):
        for tensor in [torch.empty(size // 4, device=DEVICE) for _ in range(8)]:
            tensor.fill_(float("nan"))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_for_what_its_stream_does(name: str) -> None:
    # The inputs get their values after 0.5 s. A kernel on another stream, the default one above
    # all, would read zeros, and a workspace that is not the stream's own would be written over.
    late, constant = inputs(name, 1)
    expected = run_seeded(name, late, constant)
    stream = warmed_up(name, constant)
    empty = [torch.zeros_like(t) for t in late]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for t, value in zip(empty, late, strict=True):
            t.copy_(value)
        slept = torch.cuda.Event()
        slept.record()
        found = run_seeded(name, empty, constant)
    # Nor has the call waited for the device: the CPU is here before the inputs are.
    assert not slept.query()
    dirty_free_memory()
    torch.cuda.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_for_no_other_stream(name: str) -> None:
    # The default stream sleeps, the call's results are there meanwhile: nothing of it, forward or
    # backward, ran there, and nothing waited for the whole device.
    late, constant = inputs(name, 1)
    expected = run_seeded(name, late, constant)
    stream = warmed_up(name, constant)
    torch.cuda._sleep(CYCLES)
    slept = torch.cuda.Event()
    slept.record()
    with torch.cuda.stream(stream):
        found = [t.cpu() for t in run_seeded(name, late, constant)]
    assert not slept.query()
    assert_equal(found, expected)
    torch.cuda.synchronize()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_asks_pytorch_for_no_synchronisation(name: str) -> None:
    # PyTorch raises where it would wait for the device, as .item() and .cpu() do.
    late, constant = inputs(name, 1)
    run_seeded(name, late, constant)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, late, constant)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_backward_runs_on_the_stream_of_its_forward() -> None:
    # Called from another stream, on a thread of autograd's: dy has its values after the sleep, and
    # autograd lets the forward's stream wait for them. Kernels on any other would read zeros.
    name = "batch_norm_act, one-pass"
    late, _ = inputs(name, 1)
    expected = run(name, late, [])
    x, residual, dy, weight, bias, mean, var = late
    stream = warmed_up(name, [])
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    empty = torch.zeros_like(dy)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        y = batch_norm_act(
            leaves[0], mean.clone(), var.clone(), *leaves[2:], True, residual=leaves[1], act="relu"
        )
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda._sleep(CYCLES)
    empty.copy_(dy)
    found = torch.autograd.grad(y, leaves, empty)
    assert_equal(found, expected[1:5])
    torch.cuda.synchronize()


def test_the_stream_is_found_as_the_kernels_find_it() -> None:
    # csrc/bindings/cuda_call.cpp in Python: the library that PyTorch has loaded, by its short name.
    # Where all tests fail, this one says whether it is for that.
    loaded = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    find = loaded.aoti_torch_get_current_cuda_stream
    stream, found = torch.cuda.Stream(), ctypes.c_void_p()

    def current() -> int:
        assert find(ctypes.c_int32(torch.cuda.current_device()), ctypes.byref(found)) == 0
        return found.value or 0

    assert current() == torch.cuda.default_stream().cuda_stream == 0  # the legacy default stream
    with torch.cuda.stream(stream):
        assert current() == stream.cuda_stream != 0
    assert current() == 0

"""A problem: everything that the choice of a plan may depend on, and the name it goes by."""

import ctypes
import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from fastcnn import _C
from fastcnn.common.conv_geometry import output_size

__all__ = ["Device", "Problem", "describe"]


class Device(NamedTuple):
    """What of a device decides how fast something runs on it."""

    name: str  # as its maker calls it, a CPU with its number of threads
    capability: str  # "sm_90"; on the CPU fastcnn's level, "avx512"
    driver: str


class Problem(NamedTuple):
    """One call of a convolution without its numbers; calls that share one share a plan.

    A plain tuple, since each call makes one and looks it up: together 0.9 us on an EPYC. Nothing is
    checked before the lookup fails; `key` checks then.
    """

    op: str
    x: tuple[int, ...]  # [n, c, h, w]
    weight: tuple[int, ...]  # [c_out, c / groups, kh, kw]
    dtype: torch.dtype  # of x
    device: torch.device
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    # All else that changes what is computed or how fast: epilogue, layout, arithmetic.
    # "act=relu", "residual", "channels_last", "tf32", "out=int8"; in any order.
    options: tuple[str, ...] = ()

    @property
    def y(self) -> tuple[int, int, int, int]:
        """Shape of the output, [n, c_out, h_out, w_out]."""
        n, _, *sizes = self.x
        c_out, _, *kernel = self.weight
        h, w = output_size(sizes, kernel, self.stride, self.padding, self.dilation)
        return n, c_out, h, w

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolution: 2 for each weight and output pixel."""
        return 2 * math.prod(self.y) * math.prod(self.weight[1:])

    def key(self, device: Device) -> str:
        """Return the one text of this problem, as plan files have it.

        Raises:
            ValueError: a field is no such value; a size that torch.compile keeps symbolic too.
        """
        self._check()
        sizes = {
            "x": self.x,
            "weight": self.weight,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": (self.groups,),
        }
        fields = [self.op, *(f"{name}={'x'.join(map(str, n))}" for name, n in sizes.items())]
        fields += [str(self.dtype).removeprefix("torch."), *sorted(set(self.options))]
        return " ".join([*fields, "on", device.name, device.capability])

    def _check(self) -> None:
        lengths = {"x": 4, "weight": 4, "stride": 2, "padding": 2, "dilation": 2}
        for name, length in lengths.items():
            value = getattr(self, name)
            if len(value) != length or any(type(size) is not int or size < 0 for size in value):
                raise ValueError(f"{name}: expected {length} sizes of type int, got {value}")
        if type(self.groups) is not int or self.groups < 1:
            raise ValueError(f"groups: expected an int from 1 up, got {self.groups}")
        for name in ("op", "options"):
            names = (self.op,) if name == "op" else self.options
            if not all(re.fullmatch(r"[\w=.+-]+", each) for each in names):
                raise ValueError(f"{name}: expected letters, digits and _=.+- only, got {names}")


def describe(device: torch.device) -> Device:
    """Return name, capability and driver of a device.

    Raises:
        ValueError: neither a CPU nor a numbered CUDA device.
    """
    if device.type == "cpu":
        name = f"{_processor()}, {torch.get_num_threads()} threads"
        return Device(name, _C.cpu_capability(), "none")
    if device.type == "cuda" and device.index is not None:
        return _describe_cuda(device.index)
    raise ValueError(f"device: expected cpu or a CUDA device with its index, got {device}")


def bfloat16_instructions() -> list[str]:
    """Return what this processor multiplies bfloat16 with, [] where float32 is as fast."""
    found = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512_BF16": torch.cpu._is_avx512_bf16_supported(),
    }
    return [name for name, there in found.items() if there and _C.has_fast_bf16()]


@functools.cache
def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else "CPU"


@functools.cache
def _describe_cuda(index: int) -> Device:
    major, minor = torch.cuda.get_device_capability(index)
    # The driver tells which CUDA it is made for, PyTorch does not (since 2.11); its own version is
    # in the kernel's file.
    made_for = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(made_for))
    driver = f"CUDA {made_for.value}"
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"NVRM version:.*?\s(\d+\.\d[\d.]*)\s", text)
    driver += f", {found[1]}" if found else ""
    return Device(torch.cuda.get_device_name(index), f"sm_{major}{minor}", driver)

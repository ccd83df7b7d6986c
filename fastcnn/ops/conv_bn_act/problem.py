"""What the planned ops of conv_bn_act have in common: problems, synthetic tensors, bytes, who can.

Options of a problem: out=ACT, a batch norm with that activation behind the convolution; residual;
channels_last; and how PyTorch is set: tf32, benchmark, deterministic.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.batch_norm_params import Norm
from fastcnn.common.checks import memory_format_of
from fastcnn.common.constant_result import constant_result
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.plan import Kernel, Problem
from fastcnn.triton.support import DTYPES, allows_tf32, interpreted

EPS = 1e-5
# Of cuDNN's rate, predicted (docs/gpu-notes.md); no GPU has told yet. Kernels but those of a plain
# 1x1 load by pointers and not by the TMA unit; a stem of few channels gathers them one by one.
TRITON_SHARE = 0.7
STEM_SHARE, STEM_CHANNELS = 0.25, 16

# Of shared memory: what sm_80 has for a program that opts in. The largest tiles take 128 KiB, and
# GPUs of other generations (sm_86, sm_89, sm_120), which have 99, refuse to launch them.
SHARED = 163 << 10

_ACT_NAMES = list(ACT_NUMBER)


def is_planned(x: Tensor) -> bool:
    """Whether there is a choice for x: on CUDA, and not in a graph that leaves this machine."""
    return x.is_cuda and not torch.compiler.is_exporting()


@constant_result
def _settings(float32: bool) -> tuple[str, ...]:
    """Return how PyTorch is set; under torch.compile, how it was while that traced."""
    cudnn = torch.backends.cudnn
    on = {
        "tf32": float32 and allows_tf32(),
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
    }
    return tuple(name for name in on if on[name])


def problem(
    op: str, x: Tensor, sizes: Sequence[int], weight: Sequence[int], g: ConvGeometry, *given: str
) -> Problem:
    """Return the problem of a step whose input has these sizes, and x's dtype, device, layout."""
    options = (*given, *_settings(x.dtype is torch.float32))
    if memory_format_of(x) is torch.channels_last:
        options = (*options, "channels_last")
    return Problem(
        op, tuple(sizes), tuple(weight), x.dtype, x.device, g.stride, g.padding, g.dilation,
        g.groups, options,
    )  # fmt: skip


def act_option(act: int) -> str:
    """Return the option that says which activation stands behind the convolution."""
    return f"out={_ACT_NAMES[act]}"


def act_of(problem: Problem) -> str:
    """Return the activation of that option."""
    return next(o.removeprefix("out=") for o in problem.options if o.startswith("out="))


def geometry_of(problem: Problem) -> ConvGeometry:
    """Return the problem's convolution."""
    return ConvGeometry(problem.stride, problem.padding, problem.dilation, problem.groups)


class Synthetic:
    """Tensors of a problem from a generator: values of order 1, in the problem's layout."""

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.problem, self._generator = problem, generator
        self._format = torch.contiguous_format
        if "channels_last" in problem.options:
            self._format = torch.channels_last

    def numbers(self, channels: int) -> Tensor:
        """Return float32 numbers of mean 0 and deviation 1."""
        return torch.randn(channels, generator=self._generator, device=self.problem.device)

    def image(self, sizes: Sequence[int]) -> Tensor:
        """Return an image of the problem's dtype."""
        flat = self.numbers(math.prod(sizes)).to(self.problem.dtype)
        return flat.view(list(sizes)).contiguous(memory_format=self._format)

    def weight(self) -> Tensor:
        """Return a weight whose products have deviation 1."""
        flat = self.numbers(math.prod(self.problem.weight)).to(self.problem.dtype)
        flat *= math.prod(self.problem.weight[1:]) ** -0.5
        return flat.view(self.problem.weight).contiguous(memory_format=self._format)

    def norm(self, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean, var, weight and bias."""
        mean, bias = (self.numbers(channels) for _ in range(2))
        var, weight = (self.numbers(channels).abs() + 0.5 for _ in range(2))
        return mean, var, weight, bias


def norm_of(tensors: Sequence[Tensor]) -> Norm:
    """Return the batch norm that Synthetic.norm has made."""
    mean, var, weight, bias = tensors
    return Norm(mean, var, weight, bias, EPS)


def normalised(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return what it makes of x, in float64."""
    mean, var, weight, bias = (t.double()[:, None, None] for t in tensors)
    return (x.double() - mean) / (var + EPS).sqrt() * weight + bias


def without_triton(problem: Problem) -> str | None:
    """Return why Triton's kernels cannot do a problem, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if problem.dtype not in DTYPES:
        return f"float16, bfloat16 and float32 only, not {problem.dtype}"
    if "channels_last" not in problem.options:
        return "channels_last only"
    if problem.device.type != "cuda":
        return None if interpreted() else "NVIDIA GPUs only"
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "sm_80 and later only"
    properties: Any = torch.cuda.get_device_properties(problem.device)
    there = properties.shared_memory_per_block_optin
    if there < SHARED:
        return f"GPUs with {SHARED} bytes of opt-in shared memory only, not {there}"
    return None


class Sizes:
    """Bytes of a problem's tensors, and the convolution as kernels of the model."""

    def __init__(self, problem: Problem) -> None:
        self.x, self.weight, self.y = (
            math.prod(sizes) * problem.dtype.itemsize
            for sizes in (problem.x, problem.weight, problem.y)
        )
        self._flops = problem.flops
        self._arithmetic = "tf32" if "tf32" in problem.options else ""
        _, channels, *window = problem.weight
        plain = window == [1, 1] and problem.stride == (1, 1) and problem.groups == 1
        stem = channels < STEM_CHANNELS and window != [1, 1] and channels > 1
        self._share = 1.0 if plain else STEM_SHARE if stem else TRITON_SHARE

    def cudnn(self, more: float = 0.0) -> Kernel:
        """Return one of the three convolutions: all of them read and write x, weight and y."""
        return Kernel(self.x + self.weight + self.y + more, self._flops, self._arithmetic)

    def triton(self, more: float = 0.0) -> Kernel:
        """Return one of Triton's, with more bytes for what is fused."""
        bytes = self.x + self.weight + self.y + more
        return Kernel(bytes / self._share, self._flops / self._share, self._arithmetic)

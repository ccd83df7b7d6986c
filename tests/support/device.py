"""What tests marked `gpu` run on: the GPU, or emulators where there is none.

`make gpu` runs those tests on a machine with a GPU. Elsewhere they run with all others, so that
what a GPU is asked is known to be asked rightly: Triton's kernels in its interpreter; under
on_gpu() the operators' CUDA implementations, the CUDA kernels in the emulator (cuda_emu/). What
only a GPU can answer is skipped.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from cuda_emu import library
from support.norm_cases import Place
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.ops.conv_bn_act import folded as conv2d_folded, interface as conv_bn_act

T = TypeVar("T")
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def thinned(cases: Iterable[T], step: int) -> list[T]:
    """All of them; on a GPU, where Triton compiles each kind of its kernels, every step-th."""
    return list(cases)[:: step if HAS_GPU else 1]


def slow_unless(quick: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Mark all cases but these as slow: the first line of defence has one of each kind."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]


CUDNN = "fastcnn::conv2d_relu"  # its CUDA implementation is an operator of PyTorch's


def cuda_operators() -> set[str]:
    """The operators with a CUDA implementation: "conv2d_int8", ..."""
    if not HAS_GPU:
        library.load()
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastcnn::")]
    return {n.removeprefix("fastcnn::") for n in names if _has(n, library.KEY) or _has(n, "CUDA")}


@contextmanager
def on_gpu() -> Iterator["Called"]:
    """Run CUDA implementations: on a GPU the tensors say so, elsewhere they are led there."""
    called = Called()
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            library.load()
            for module in (conv_bn_act, conv2d_folded):
                patch.setattr(module, "is_planned", lambda x: not torch.compiler.is_exporting())
                patch.setattr(module, "folds", lambda x: False)
        with called:
            yield called


GPU = Place(DEVICE, on_gpu)


class Called(TorchDispatchMode):
    """The operators that were called: fastcnn's own, and others, by those of them in Python too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if not name.startswith("fastcnn::"):
            self.others.append(str(func))
            return func(*args, **kwargs)
        self.operators.append(name.removeprefix("fastcnn::"))
        if HAS_GPU or not all(_is_plain(t) for t in args if isinstance(t, Tensor)):
            return func(*args, **kwargs)  # by its tensors
        if _has(name, library.KEY):
            return func.redispatch(DispatchKeySet(DispatchKey.PrivateUse1), *args, **kwargs)
        if name != CUDNN and _has(name, "CUDA"):
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **kwargs)
        return func(*args, **kwargs)


def _has(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _is_plain(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.layout is torch.strided

"""What conv2d_folded keeps, and for how long: as long as what it was made of is the same."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn._C import Snapshot
from fastcnn.common.checks import check_storage

Tensors = tuple[Tensor | None, ...]  # weight, bias, mean, var, weight and bias of the batch norm
Run = Callable[[Tensor, Tensor | None, bool], Tensor]  # x, residual, whether that dies

_MOST_SIZES = 4  # of inputs, that packed weights are kept for


class Seen:
    """A tensor as it was. Holds its storage, so that no other one gets this address."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version
        self._storage = tensor.untyped_storage()
        self._place = self._place_of(tensor)

    def is_still(self, t: Tensor | None) -> bool:
        return t is self.tensor and t._version == self._version and self._place_of(t) == self._place

    def _place_of(self, t: Tensor) -> tuple[Any, ...]:
        """Which memory t is, and how much there is: share_memory() and resize_() move a storage."""
        storage = self._storage
        return (
            t.data_ptr(), t.dtype, t.shape, t.stride(), storage.data_ptr(), storage.nbytes()
        )  # fmt: skip


def is_comparable(tensors: Tensors) -> bool:
    """Whether writes to these that change no version counter can be seen.

    On the CPU in dense memory; on other devices nothing is read back, refresh() is for those.
    """
    return all(t is None or t.device.type != "cpu" or _is_dense(t) for t in tensors)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or (
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    )


def _snapshot(tensors: Tensors) -> Snapshot | None:
    """Return the values as they are: all of the vectors, a checksum of each place in a filter."""
    weight, *rest = tensors
    if weight is None or weight.device.type != "cpu":
        return None
    vectors = [t for t in rest if t is not None and t.device.type == "cpu"]
    blocks = [(t.data_ptr(), t.numel() * t.element_size()) for t in vectors]
    filters, size = weight.shape[0], weight[:1].numel()
    return Snapshot(blocks, weight.data_ptr(), filters, size, weight.element_size())


class State:
    """What was made of tensors and numbers that have not changed since."""

    def __init__(self, tensors: Tensors, numbers: tuple[Any, ...]) -> None:
        names = ("weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias")
        check_storage("conv_bn_act", **dict(zip(names, tensors, strict=True)))
        self.seen = [None if t is None else Seen(t) for t in tensors]
        self._snapshot = _snapshot(tensors)
        self.numbers = numbers
        self.runs: dict[Any, tuple[Run, list[int]]] = {}  # with the sizes of y
        self._lock = threading.Lock()
        self._made: dict[Any, Any] = {}

    def is_of(self, tensors: Tensors, numbers: tuple[Any, ...]) -> bool:
        for seen, t in zip(self.seen, tensors, strict=True):
            if t is not None if seen is None else not seen.is_still(t):
                return False
        if self.numbers != numbers:
            return False
        return self._snapshot is None or self._snapshot.is_current()

    def keep(self, key: Any, run: Run, sizes: list[int]) -> tuple[Run, list[int]]:
        """Keep what inputs of a kind run, and the sizes of what they give."""
        with self._lock:
            while len(self.runs) >= _MOST_SIZES:
                del self.runs[next(iter(self.runs))]
            self.runs[key] = run, sizes
        return run, sizes

    def kept(self, make: Callable[..., Any], weight: Tensor, *how: Any) -> Any:
        """Return make(weight, *how), kept; how ends in a dtype."""
        stream = 0
        if weight.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                # A part of the graph, which may be replayed after other weights.
                return make(weight, *how)
            # Other streams would have to wait for the one that makes it.
            stream = torch.cuda.current_stream(weight.device).cuda_stream
        key = make, how[-1], stream
        if key not in self._made:
            self._made[key] = make(weight, *how)
        return self._made[key]


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """Return module.name. Parametrizations have it elsewhere; nn.Module's own way takes 0.4 us."""
    parameters = module._parameters
    found: Tensor | None = parameters[name] if name in parameters else getattr(module, name)
    return found

"""What conv2d_folded keeps, and for how long: as long as what it was made of is the same."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn import _C
from fastcnn._C import Snapshot
from fastcnn.common.checks import check_storage

Tensors = tuple[Tensor | None, ...]  # weight, bias, mean, var, weight and bias of the batch norm
Run = Callable[[Tensor, Tensor | None, bool], Tensor]  # x, residual, whether that dies

_PLAIN = (Tensor, int, float, str, tuple, type(None))
MOST_SIZES = 4  # of inputs, that packed weights are kept for


def _as_seen(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return versions and memory of tensors: share_memory() and resize_() move a storage."""
    return [(t._version, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


Attribute = tuple[dict[str, Any], str, Any]  # where it lies, its name, its value


def attributes_of(module: nn.Module, names: Sequence[str]) -> list[Attribute] | None:
    """Return attributes as they are; None where one is computed, or can change in depth."""
    inside = vars(module)
    places = ("_parameters", "_buffers")
    found: list[Attribute] = [(inside, place, inside[place]) for place in places]
    for name in names:
        holders = [held for held in (inside, *(inside[place] for place in places)) if name in held]
        if not holders or not isinstance(holders[0][name], _PLAIN):
            return None
        found.append((holders[0], name, holders[0][name]))
    return found


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


class Unchanged:
    """Says whether modules, and the tensors that states were made of, are as they were.

    And whether no gradient is asked of these: what was made of them has none.
    """

    def __init__(self, states: Sequence["State"], attributes: Sequence[Attribute] = ()) -> None:
        self._attributes = list(attributes)
        self._tensors = [t for state in states for t in state.tensors]
        self._seen = [seen for state in states for seen in state.seen]
        self._snapshots = [state.snapshot for state in states if state.snapshot is not None]

    def holds(self) -> bool:
        """Say it, as far as one call looks at values."""
        if self._attributes and _C.first_changed(self._attributes, None, 0) >= 0:
            return False
        if torch.is_grad_enabled() and any([t.requires_grad for t in self._tensors]):
            return False
        if _as_seen(self._tensors) != self._seen:
            return False
        return all([snapshot.is_current() for snapshot in self._snapshots])  # each moves on


class State:
    """What was made of tensors and numbers that have not changed since."""

    def __init__(self, op: str, tensors: Tensors, numbers: tuple[Any, ...]) -> None:
        names = ("weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias")
        check_storage(op, **dict(zip(names, tensors, strict=True)))
        self._given = tensors
        self.tensors = [t for t in tensors if t is not None]
        # Held, so that no other tensor gets their addresses.
        self._storages = [t.untyped_storage() for t in self.tensors]
        self.seen = _as_seen(self.tensors)
        self.snapshot = _snapshot(tensors)
        self.numbers = numbers
        self.runs: dict[Any, tuple[Run, list[int]]] = {}  # with the sizes of y
        self._lock = threading.Lock()
        self._made: dict[Any, Any] = {}

    def is_of(self, tensors: Tensors, numbers: tuple[Any, ...]) -> bool:
        same = all(t is given for t, given in zip(tensors, self._given, strict=True))
        return same and self.numbers == numbers and Unchanged([self]).holds()

    def keep(self, key: Any, run: Run, sizes: list[int]) -> tuple[Run, list[int]]:
        """Keep what inputs of a kind run, and the sizes of what they give."""
        with self._lock:
            while len(self.runs) >= MOST_SIZES:
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

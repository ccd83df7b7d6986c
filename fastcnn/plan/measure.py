"""Time and memory, measured so that two numbers may be compared.

Time: both candidates run in one process and take turns, in an order that alternates; what the
machine does meanwhile (clock, cache, other people) then falls on both. The result is the median of
the ratios of neighbouring calls, not the ratio of two averages.

Memory: what autograd keeps from forward to backward, counted and not sampled, so that it is the
same number on any machine.
"""

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["interleaved", "ratio", "saved_for_backward"]


class _Saved:
    """Autograd holds this in place of a saved tensor: it lives as long as its graph node."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_for_backward(fn: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps when `fn` has returned.

    `fn` runs a forward and returns what backward would start from: it is called once, and its
    result keeps the graph alive while the bytes are counted. A storage counts once and whole, also
    where several tensors or only a view of it are saved, since it stays in memory whole. Storages
    of `exclude` do not count: pass parameters and buffers, which live anyway. Freed intermediates
    do not count, nor does what a Function hides from autograd by storing tensors on ctx instead of
    save_for_backward. Source: torch.autograd.graph.saved_tensors_hooks.

    Raises:
        ValueError: `fn` returns None.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # Weak: a graph node that dies during forward takes its tensor along, as it does unmeasured.
    # All that is left at the end is alive at once, so that no two storages share an address.
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = fn()
    if result is None:
        raise ValueError("fn: expected to return what backward starts from (a loss), got None")
    storages = (holder.tensor.untyped_storage() for holder in saved)
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(nbytes for address, nbytes in kept.items() if address not in excluded)


def _seconds(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    seconds: Callable[[Callable[[], object]], float] = _seconds,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` a name: times[name][i] is from round i.

    Every round calls each of `runs` once, odd rounds in reverse order, so that nobody always runs
    into the other's warm or cold cache; `warmup` rounds come first and are not reported. `seconds`
    makes a call and times it; as it is, by the process's clock, with an accelerator synchronised
    before and after, which overstates short kernels: fastcnn.plan.timer has a better one. Compare
    with `ratio`.

    Raises:
        ValueError: repeats < 1 or warmup < 0.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup: expected at least 0, got {warmup}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + repeats):
        names = list(runs) if i % 2 == 0 else list(runs)[::-1]
        for name in names:
            took = seconds(runs[name])
            if i >= warmup:
                times[name].append(took)
    return times


def ratio(times_a: Sequence[float], times_b: Sequence[float]) -> float:
    """Median over rounds i of times_a[i] / times_b[i]: the speedup of b over a.

    Takes two lists of one `interleaved` call; a slow spell of the machine then cancels, which the
    ratio of two medians cannot promise.

    Raises:
        ValueError: the lists are empty or of different lengths.
    """
    if not times_a or len(times_a) != len(times_b):
        raise ValueError(
            "times_a, times_b: expected as many times in both, at least one, "
            f"got {len(times_a)} and {len(times_b)}"
        )
    return statistics.median(a / b for a, b in zip(times_a, times_b, strict=True))

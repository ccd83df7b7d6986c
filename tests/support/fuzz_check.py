"""How each result of the fuzz is compared: with float64, and bit by bit with calls like it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from support.activations import near_nondifferentiable
from support.fuzz_cases import placed, strange
from support.norm_cases import Normalised, halved, norm_errors
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded, margin
from torch import Tensor

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], Tensor]


def memory(t: Tensor) -> Tensor:
    """The bytes of all the memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, NaN and signs of zero included."""
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[a.element_size()]
    return torch.equal(a.view(whole), b.view(whole))


def outcome(fn: Function, tensors: Tensors, leaves: list[str], dy: Tensor) -> dict[str, Tensor]:
    """y, the leaves' gradients, and the running statistics after the call."""
    given = {k: t.detach().requires_grad_(k in leaves) for k, t in tensors.items()}
    running = {k: placed(t, LAYOUTS["nchw"], 1) for k, t in tensors.items() if "running" in k}
    y = fn({**given, **running})
    y.backward(dy)
    return {"y": y.detach(), **running} | {f"d{k}": given[k].grad for k in leaves}


def to(tensors: Tensors, **how: Any) -> dict[str, Tensor]:
    """Convert all; the memory format of images alone."""
    images = {k: t.to(**how) for k, t in tensors.items() if t.dim() == 4}
    how.pop("memory_format", None)
    return images | {k: t.to(**how) for k, t in tensors.items() if t.dim() != 4}


def check(
    ours: Function,
    eager: Function,
    tensors: Tensors,
    dy: Tensor,
    errors: Mapping[str, Tensor | float],
    kind: str,
    halves: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare y and all gradients with eager's in float64, and bit by bit with calls like it.

    errors, halves: assert_rounded's for each result. kind: of the second dy.
    """
    leaves = [k for k in tensors if "running" not in k]
    before = {k: memory(t) for k, t in [*tensors.items(), ("dy", dy)]}
    actual = outcome(ours, tensors, leaves, dy)
    # NCHW: there PyTorch's group norm has two passes, and loses no digits to a large mean.
    wide = to(tensors, dtype=torch.float64, memory_format=torch.contiguous_format)
    expected = outcome(eager, wide, leaves, dy.double())
    assert actual.keys() == expected.keys()
    for k, t in actual.items():
        like = dy if k == "y" else tensors[k.removeprefix("d")]
        assert t.dtype == like.dtype, f"{k}: expected {like.dtype}, got {t.dtype}"
        if t.dim() == 4 and t.numel() > 0 and k != "dskip":  # that is a view of dy
            assert layouts(t) == layouts(like), f"{k}: expected {layouts(like)}, got {t.stride()}"
        assert_rounded(k, t, expected[k], errors[k], (halves or {}).get(k, 0.0))
        if "running" in k:
            assert memory_around_is_nan(t), f"{k}: written around"
    for k, t in [*tensors.items(), ("dy", dy)]:
        assert torch.equal(memory(t), before[k]), f"{k}: modified, or written around"
    check_bits(ours, tensors, leaves, dy, actual, kind)


def check_bits(
    ours: Function,
    tensors: Tensors,
    leaves: list[str],
    dy: Tensor,
    first: Mapping[str, Tensor],
    kind: str,
) -> None:
    """The same in a second run, on two threads, for a dy of any strides, and for x alone.

    But for a residual: where its gradient is wanted, dx is made of it, rounded as it is.
    """
    with two_threads():
        again = outcome(ours, tensors, leaves, dy)
        alone = {} if "residual" in tensors else outcome(ours, tensors, ["x"], dy)
    for k, t in again.items():
        assert same_bits(t, first[k]), f"{k}: other bits on two threads"
    for k, t in alone.items():
        assert same_bits(t, first[k]), f"{k}: other bits where x alone requires a gradient"
    if dy.numel() == 0:
        return
    other = strange(dy, kind)
    layout = torch.contiguous_format if dy.is_contiguous() else torch.channels_last
    dense = outcome(ours, tensors, leaves, other.clone(memory_format=layout))
    for k, t in outcome(ours, tensors, leaves, other).items():
        assert torch.equal(t, dense[k]), f"{k}: other bits for a dy that is {kind}"


@contextmanager
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def layouts(t: Tensor) -> list[str]:
    """In which a tensor is dense: in both with one channel or one pixel."""
    return [k for k, layout in LAYOUTS.items() if t.is_contiguous(memory_format=layout)]


def distance(t: Tensor, exact: Tensor) -> float:
    return (t.double() - exact).abs().max().item() if t.numel() > 0 else 0.0


def memory_around_is_nan(t: Tensor) -> bool:
    base, start = t._base, t.storage_offset()
    return bool(base[:start].isnan().all() & base[start + t.numel() :].isnan().all())


def norm_bounds(
    n: Normalised, z: Tensor, act: str, dy: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return check's errors and halves of a normalisation.

    Where a rounding of z decides about a gradient either one is right: dy becomes 0 there.
    """
    if dy.numel() == 0:
        return dict.fromkeys(norm_errors(n, dy.dtype), torch.zeros(())), {}
    near = margin(dy.dtype) * (1 + z.abs() / 8) + norm_errors(n, dy.dtype)["z"]
    dy.masked_fill_(near_nondifferentiable(z, act, near), 0)
    n = n._replace(dy=dy.double())
    errors = norm_errors(n, dy.dtype)
    errors |= {k: errors[k].flatten() for k in ("running_mean", "running_var")}
    return errors, halved(n) if isinstance(n.residual, Tensor) else {}

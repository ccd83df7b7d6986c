"""What makes runs of one model in several precisions comparable: jumps, dropout, random numbers.

A gradient jumps at non-differentiable points, where relu's input is 0, or two values of a max
pooling's window are equal: there a rounding decides, and one element that falls to the other side
shows in all gradients before it, far above rounding. How far is computed: the exact run is repeated
with the derivatives of the other side for all elements that are as near to such a point as
fastcnn's errors may be (difference.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastcnn import functional

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_JUMPS: dict[Any, tuple[float, ...]] = {
    **dict.fromkeys(_RELU, (0.0,)),
    F.leaky_relu: (0.0,),
    F.leaky_relu_: (0.0,),
    F.relu6: (0.0, 6.0),
    F.hardswish: (-3.0, 3.0),
    F.hardsigmoid: (-3.0, 3.0),
    F.hardtanh: (),
}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
             F.feature_alpha_dropout}  # fmt: skip
_DRAWS_IN_PLACE = {Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_}
_DRAWS = _DRAWS_IN_PLACE | {
    torch.bernoulli, Tensor.bernoulli, torch.rand, torch.randn, torch.rand_like, torch.randn_like,
    torch.randint, torch.randperm,
}  # fmt: skip
_SEED = 1789


class Comparable(TorchFunctionMode):
    """Runs a model without dropout, on numbers that are drawn alike in each run.

    seen: what came to the functions whose derivatives jump, in the order of the calls. beside: the
    same of a run in a lower precision; other_side: take the derivatives of the other side near a
    jump.
    """

    def __init__(self, beside: list[Tensor] | None = None, other_side: bool = False) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.near = 0  # elements
        self._beside, self._other_side, self._draws = beside, other_side, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            args = (args[0], 0.0, *args[2:]) if len(args) > 1 else args
            kwargs = kwargs if len(args) > 1 else {**kwargs, "p": 0.0}
        elif func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = kwargs if len(args) > 4 else {**kwargs, "dropout_p": 0.0}
        elif func in _DRAWS:
            return self._draw(func, args, kwargs)
        elif func in _JUMPS or func is F.max_pool2d:
            return self._jumping(func, args, kwargs)
        return func(*args, **kwargs)

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._draws += 1
        torch.manual_seed(_SEED + self._draws)
        if func in _DRAWS_IN_PLACE and args[0].dtype is torch.float64:
            drawn = torch.empty_like(args[0], dtype=torch.float32)
            return args[0].copy_(func(drawn, *args[1:], **kwargs))
        return func(*args, **kwargs)

    def _jumping(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z = args[0] if args else kwargs.pop("input")
        at = len(self.seen)
        self.seen.append(z.detach().clone())
        if self._beside is None or at >= len(self._beside) or self._beside[at].shape != z.shape:
            return func(z, *args[1:], **kwargs)
        rough = self._beside[at]
        error = (rough.double() - z.detach()).abs().max().item() if z.numel() else 0.0
        largest = z.detach().abs().max().item() if z.numel() else 0.0
        margin = 4 * (error + torch.finfo(rough.dtype).eps * largest)
        if func is F.max_pool2d:
            return self._pool(z, margin, args[1:], kwargs)
        in_place = func.__name__.endswith("_") or any(
            a is True for a in (*args[1:], kwargs.get("inplace"))
        )
        copied = in_place and self._other_side  # and written over when all is computed
        before = z.clone() if in_place else z
        y = func(before.clone() if copied else z, *args[1:], **kwargs)
        jumps: tuple[Any, ...] = _JUMPS[func]
        if func is F.hardtanh:
            ends = dict(zip(("min_val", "max_val"), args[1:], strict=False), **kwargs)
            jumps = (ends.get("min_val", -1.0), ends.get("max_val", 1.0))
        for jump in jumps:
            near = (before.detach() - jump).abs() <= margin
            self.near += int(near.sum().item())
            if self._other_side:
                mirrored = -func(2 * jump - before, *args[1:], **kwargs)
                y = torch.where(near, y.detach() + (mirrored - mirrored.detach()), y)
        return z.copy_(y) if copied else y

    def _pool(self, z: Tensor, margin: float, args: Any, kwargs: dict[str, Any]) -> Any:
        y = F.max_pool2d(z, *args, **kwargs)
        if not isinstance(y, Tensor) or z.dim() != 4:
            return y
        how = {k: v for k, v in kwargs.items() if k != "return_indices"}
        first = F.max_pool2d(z.detach(), *args[:5], **how, return_indices=True)[1].flatten(2)
        flat = z.detach().flatten(2)
        lowered = flat.scatter(2, first, flat.gather(2, first) - 2 * margin).view_as(z)
        second = F.max_pool2d(lowered, *args[:5], **how, return_indices=True)[1].flatten(2)
        other = z.flatten(2).gather(2, second).view_as(y)
        near = (y - other).detach().abs() <= margin
        self.near += int(near.sum().item())
        return (
            torch.where(near, y.detach() + (other - other.detach()), y) if self._other_side else y
        )


@contextmanager
def without_dropout() -> Iterator[None]:
    """Let fastcnn's dropout run with p=0."""
    real: Callable[..., Tensor] = functional.dropout

    def kept(x: Tensor, p: float = 0.5, *args: Any, **kwargs: Any) -> Tensor:
        return real(x, 0.0, *args, **kwargs)

    with patch.object(functional, "dropout", kept):
        yield

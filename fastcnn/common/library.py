"""The dispatcher library `fastcnn`: schemas are declared here, kernels come from _ops.so."""

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch._functorch.utils import unwrap_dead_wrappers

from fastcnn import _C
from fastcnn.common.checks import check_storage
from fastcnn.common.overrides import plain_tensors

# Kernels read memory in the order that the strides of tracing time promised.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def declare(schema: str, fake: Callable[..., Any]) -> None:
    """Declare an operator: its schema, and what it returns for tensors without data."""
    name = f"fastcnn::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :], tags=_TAGS)

    def checked_fake(*args: Any) -> Any:
        _check_required(name, args)
        # Not only tracing comes here: the dispatcher sends a call to the fake as soon as one tensor
        # is on meta, and the others may hold data, for which there is no result.
        several = [t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,))]
        devices = {str(t.device) for t in several if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: expected one device, got {', '.join(sorted(devices))}")
        return fake(*args)

    torch.library.register_fake(name, checked_fake)


def implement(operator: str, devices: str | Sequence[str], kernel: Callable[..., Any]) -> None:
    """Register a kernel in Python for a declared operator."""
    name = f"fastcnn::{operator}"

    def checked(*args: Any) -> Any:
        _check_required(name, args)
        return kernel(*args)

    torch.library.impl(name, devices)(checked)


def _check_required(name: str, args: Sequence[Any]) -> None:
    # The dispatcher takes None for any tensor; kernels in C++ refuse it by themselves.
    for i, argument in _required(name):
        if not isinstance(args[i], Tensor):
            raise RuntimeError(f"{name}: {argument}: expected a tensor, got None")


@functools.cache
def _required(name: str) -> list[tuple[int, str]]:
    """Return an operator's tensors that may not be left out, by place and name."""
    arguments = getattr(torch.ops.fastcnn, name.removeprefix("fastcnn::")).default._schema.arguments
    return [(i, a.name) for i, a in enumerate(arguments) if str(a.type) == "Tensor"]


def by_name(operator: Any, args: Sequence[Any]) -> dict[str, Any]:
    """Return an operator's arguments under the names of its schema."""
    return dict(zip(_names(operator), args, strict=True))


@functools.cache
def _names(operator: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in operator._schema.arguments)


class _Refused(torch.autograd.Function):
    """The first `count` of its tensors, which cannot be differentiated by any of them.

    call: whose gradients they are.
    """

    @staticmethod
    def forward(call: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: str, count: int, *tensors: Tensor | None) -> Any:
        return _Refused.apply(call, count, *tensors), tuple(in_dims[2 : 2 + count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.call}: expected to be differentiated once, got a backward of its gradient; for "
            f"gradient penalties and second derivatives use PyTorch's layers, which "
            f"fastcnn.revert(model) gives a converted model back; within "
            f"torch.autograd.detect_anomaly() PyTorch says where it was called"
        )


class _Retained:
    """A ctx whose saved tensors stay for several backward passes."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def maybe_clear_saved_tensors(self) -> None:
        pass


class _Gradients(torch.autograd.Function):
    """backward(ctx, *dys) under torch.vmap: a call for each of its samples.

    There torch.func.jacrev runs it, with a row of the Jacobian's for a sample. The kernels have no
    rules for batches of tensors, and memory formats have none at all.
    """

    @staticmethod
    def forward(backward: Callable[..., Any], ctx: Any, *dys: Tensor | None) -> Any:
        return backward(ctx, *dys)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*(t for t in output if t is not None))

    @staticmethod
    def vmap(info: Any, in_dims: Any, backward: Any, ctx: Any, *dys: Tensor | None) -> Any:
        at = in_dims[2:]
        grads = []
        for i in range(info.batch_size):
            pairs = zip(dys, at, strict=True)
            sample = [dy if dy is None or d is None else dy.select(d, i) for dy, d in pairs]
            grads.append(_Gradients.apply(backward, ctx, *sample))
        stacked = [None if g[0] is None else torch.stack(g) for g in zip(*grads, strict=True)]
        return tuple(stacked), tuple(None if t is None else 0 for t in stacked)


def _is_vmapped() -> bool:
    if not torch._C._are_functorch_transforms_active():
        return False
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters())


def each_of_batched(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's gradients row by row within torch.autograd.grad(is_grads_batched=True).

    That is PyTorch's older vmap, which has no rule of a Function's and no memory formats.
    """

    def run(ctx: Any, *dys: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *dys)
        batched = [dy is not None and is_legacy_batchedtensor(dy) for dy in dys]
        if not any(batched):
            return backward(ctx, *dys)

        def stacks(level: int) -> list[Any]:
            pairs = zip(dys, batched, strict=True)
            return [torch._remove_batch_dim(dy, level, 1, 0) if its else dy for dy, its in pairs]

        def is_level(level: int) -> bool:
            return not any(map(is_legacy_batchedtensor, compress(stacks(level), batched)))

        # Nothing tells how deep calls are nested here, which may be another thread than theirs.
        level = next(filter(is_level, range(1, 64)), 1)
        given, ctx = stacks(level), _Retained(ctx)
        grads = [
            backward(ctx, *(dy[i] if its else dy for dy, its in zip(given, batched, strict=True)))
            for i in range(len(next(compress(given, batched))))
        ]
        return tuple(
            None if g[0] is None else torch._add_batch_dim(torch.stack(g), 0, level)
            for g in zip(*grads, strict=True)
        )

    return run


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Function's gradients refuse to be differentiated again.

    Also where dy is a constant, as behind a sum: they depend on what was saved, too. The decorator
    that torch has looks at dy alone, and a gradient penalty would be wrong in silence.
    """
    op = backward.__module__.removeprefix("fastcnn.ops.").split(".")[0]
    backward = each_of_batched(backward)

    def run(ctx: Any, *dys: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *dys)
        again = torch.is_grad_enabled()  # create_graph=True
        saved = ctx.saved_tensors if again else ()  # backward may let go of them
        with torch.no_grad(), plain_tensors():
            if _is_vmapped():
                grads = _Gradients.apply(backward, _Retained(ctx), *dys)
            else:
                grads = backward(ctx, *dys)
        if not again:
            return grads
        sizes = " and ".join(str(list(dy.shape)) for dy in dys if dy is not None)
        call = f"{op} with an output of {sizes}"
        return _Refused.apply(call, len(grads), *grads, *dys, *saved)

    return run


Forward = TypeVar("Forward", bound=Callable[..., Any])


def positional(forward: Forward) -> Forward:
    """Give a Function's forward a signature that takes any positional arguments.

    Function.apply binds its arguments to inspect.signature(forward) at every call. A stored, simple
    signature took 20 of 178 us off a two-step chain's forward (2-core AMD EPYC, torch 2.13).
    """
    everything = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
    forward.__signature__ = inspect.Signature([everything])  # type: ignore[attr-defined]
    return forward


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Return function.apply(*args).

    While compiling, where nothing asks for a gradient, its forward alone: dynamo would inline that
    too, but tells whether there is a ctx by counting the parameters of a signature, see positional.
    """
    if torch.compiler.is_compiling():
        tensors = [t for t in args if isinstance(t, Tensor)]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return function.apply(*args) if wanted else function.forward(*args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # Function.apply's own way there, without binding the arguments: 12 of 30 us of a chain's.
    alive = unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*alive)  # type: ignore[misc]


def apply_moving(
    function: type[torch.autograd.Function], *args: Any, move: Callable[[Any], None]
) -> Any:
    """Return function.apply(*args, move), where move(output) moves running statistics.

    In setup_context, before autograd saves a tensor: activation checkpointing ends its second
    forward with the last one that is saved, and PyTorch's kernels have moved the statistics by
    then. Behind the Function where it is traced or transformed, which takes no effects within.
    """
    inside = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    output = apply(function, *args, move if inside else None)
    if not inside:
        move(output)
    return output


def distinct(*tensors: Any) -> tuple[Any, ...]:
    """Return the tensors, under torch.compile with a view in place of each that came before.

    Dynamo refuses a Function that gets one tensor twice, as the block input that is the residual
    too, and would break the graph there.
    """
    if not torch.compiler.is_compiling():
        return tensors
    seen: list[Any] = []
    for t in tensors:
        repeated = t is not None and any(t is other for other in seen)
        seen.append(t.view_as(t) if repeated else t)
    return tuple(seen)


def _clone(t: Tensor) -> Tensor:
    check_storage("clone_no_cse", t=t)
    return t.clone()


declare("clone_no_cse(Tensor t) -> Tensor", torch.empty_like)
implement("clone_no_cse", ("cpu", "cuda"), _clone)


def clone_no_cse(t: Tensor) -> Tensor:
    """Return t, under torch.compile as a copy that the compiler cannot know to be equal to t.

    What backward computes from it again then stays in backward: AOTAutograd would else find the
    same operator on the same tensors in forward, and keep that result.
    """
    return torch.ops.fastcnn.clone_no_cse.default(t) if torch.compiler.is_compiling() else t


def load_kernels() -> None:
    """Load the kernels of this build into the declared operators."""
    library = Path(_C.__file__).with_name("_ops.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"fastcnn {_C.version} cannot load its kernels {library} into torch "
            f"{torch.__version__}: {error}; rebuild it against this torch with "
            f"`pip install --no-build-isolation --force-reinstall --no-deps .`"
        ) from error

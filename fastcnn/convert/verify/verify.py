"""verify(): a converted model beside the unconverted one, place by place.

Both run forward and backward on copies, and the unconverted one in float64 too, which is the truth.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.convert.converted import Converted, as_original, convert_copy
from fastcnn.convert.graph.side_effects import Snapshot
from fastcnn.convert.options import check_inputs, check_module
from fastcnn.convert.verify.capture import Log, Map, Place, map_of, watch
from fastcnn.convert.verify.determinism import Comparable, without_dropout
from fastcnn.convert.verify.difference import Difference, Verification, difference

__all__ = ["Difference", "Verification", "verify"]

_SEED = 2026
_RUNS = 3  # of PyTorch's


class _Run(NamedTuple):
    results: dict[str, Tensor]  # output, input and parameter gradients, buffers
    log: Log
    seen: list[Tensor]
    near: int


def verify(model: nn.Module, x: Any) -> Verification:
    """Compare a converted model with the unconverted one on an input; print and return a table.

    Forward and backward, from a random gradient of the output, in the model's mode and the autocast
    state of now. All runs are of copies: the model stays as it is, to the bit. Dropout runs with
    p=0, since fastcnn draws other masks than PyTorch; other random numbers are alike in all runs.

    Args:
        model: converted. Where it was changed afterwards, what is compared is a conversion of what
            it is now.
        x: its input, or a tuple of its inputs.

    Returns:
        All differences as parts of each value's norm, each with PyTorch's own and the limit; `ok`
        says whether all are rounding, `first` is the first that is not.

    Raises:
        TypeError: a model that is no Module; inputs without a Tensor.
        ValueError: nothing in the model is converted, or it does not run in float64.

    Example:
        >>> layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> model = fastcnn.convert(torch.nn.Sequential(*layers))
        >>> found = fastcnn.verify(model, torch.randn(2, 3, 8, 8))
        no difference above rounding in ... values; dropout ran with p=0
        ...
        >>> found.ok
        True
    """
    check_module("verify", model)
    inputs = check_inputs("verify", x)
    found: list[Any] = [(n, m) for n, m in model.named_modules() if isinstance(m, Converted)]
    if not found:
        raise ValueError("verify: model: expected a converted model; nothing in it is converted")
    with as_original([m for _, m in found]):
        plain = copy.deepcopy(model)
    fused = copy.deepcopy(plain)
    for name, module in found:
        convert_copy(module._fastcnn_conversion.recipe(), fused.get_submodule(name))
    exact = copy.deepcopy(plain)
    with _aside(model):
        seen = map_of(fused)
        called = _run(fused, inputs)
        written = _run(plain, inputs)
        ours = _run(fused, inputs, seen, fused=True)
        if any(m._fastcnn_conversion.options.mode == "infer" for _, m in found):
            # Folded weights run where no gradient is required.
            ours.log.values.update(_run(fused, inputs, seen, fused=True, back=False).log.values)
            called.results.update(_run(fused, inputs, back=False).results)
        theirs = [_run(plain, inputs, seen, nudge=i) for i in range(_RUNS)]
        try:
            exact.double()
            truth = _run(exact, inputs, seen, beside=theirs[0].seen)
            there = truth
            if truth.near:
                there = _run(exact, inputs, seen, beside=theirs[0].seen, other_side=True)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"verify: the model does not run in float64: {error}") from error
    truths = (theirs, truth, there)
    named = _results(called, written, *truths)
    forward = ("output", "buffer")
    result = Verification(
        [
            *_values(seen, ours, *truths),
            *(row for row in named if row.place.startswith(forward)),
            *_gradients(seen, ours, *truths),
            *(row for row in named if not row.place.startswith(forward)),
        ]
    )
    print(result)
    return result


def _values(
    seen: Map, ours: _Run, theirs: list[_Run], truth: _Run, there: _Run
) -> Iterator[Difference]:
    for key, exact in truth.log.values.items():
        place = _place(seen, key)
        three = (ours.log.values.get(key), [t.log.values.get(key) for t in theirs], exact)
        yield difference(place, "forward", (place.name,), *three, exact)


def _gradients(
    seen: Map, ours: _Run, theirs: list[_Run], truth: _Run, there: _Run
) -> Iterator[Difference]:
    for key, exact in truth.log.gradients.items():  # in the order in which backward makes them
        place = _place(seen, key)
        three = (ours.log.gradients.get(key), [t.log.gradients.get(key) for t in theirs], exact)
        yield difference(place, "backward", place.readers, *three, there.log.gradients[key])


def _results(
    called: _Run, written: _Run, theirs: list[_Run], truth: _Run, there: _Run
) -> list[Difference]:
    found = []
    for name, exact in truth.results.items():
        what = name.split(" ")[0].split(".")[0]
        for run, pattern in ((called, ""), (written, "as written, beside its trace")):
            three = (run.results.get(name), [t.results.get(name) for t in theirs], exact)
            there_too = there.results.get(name, exact)
            row = difference(
                Place(name, pattern), what, (name,), *three, there_too, _terms(name, truth)
            )
            if run is called or not row.ok:
                found.append(row)
    return found


def _terms(name: str, truth: _Run) -> Tensor | None:
    """Return what is rounded, where a result is what is left of larger terms."""
    if name.endswith("running_mean"):  # of values as large as their deviation
        variance = truth.results.get(name.removesuffix("mean") + "var")
        return None if variance is None else variance.sqrt()
    weight = truth.results.get(name.removesuffix("bias") + "weight")
    if not name.endswith("bias") or weight is None:
        return None
    # Before a batch norm a bias has no gradient: its terms cancel. They are larger than the
    # weight's gradient by 1 / sqrt(eps) at most, for a variance of 0.
    has_none = truth.results[name].norm() <= 1e-6 * weight.norm()
    return weight / 1e-5**0.5 if has_none else None


def _place(seen: Map, key: str) -> Place:
    place = seen.places[key.split(" (call ")[0]]
    return place._replace(name=place.name + key.removeprefix(key.split(" (call ")[0]))


def _aside(model: nn.Module) -> ExitStack:
    """What happens inside leaves no random state changed."""
    stack = ExitStack()
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    stack.enter_context(torch.random.fork_rng(devices=list(devices)))
    stack.callback(random.setstate, random.getstate())
    stack.enter_context(without_dropout())
    stack.enter_context(torch.enable_grad())
    return stack


def _run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    seen: Map | None = None,
    fused: bool = False,
    beside: list[Tensor] | None = None,
    other_side: bool = False,
    nudge: int = 0,
    back: bool = True,
) -> _Run:
    """Run a copy forward and, with gradients, backward, and put back its buffers and attributes.

    beside: the copy is in float64. nudge: change the inputs by a rounding, each in its way.
    """
    log, mode = Log(), Comparable(beside, other_side)
    before, attributes = {name: b.clone() for name, b in model.named_buffers()}, Snapshot(model)
    random.seed(_SEED)
    torch.manual_seed(_SEED)
    leaves: list[Tensor] = []
    mine = [_moved(value, beside is not None, nudge, leaves) for value in inputs]
    model.zero_grad()
    with ExitStack() as stack, torch.set_grad_enabled(back):
        if seen is not None:
            stack.enter_context(watch(model, seen, log, fused))
        for kind in ("cpu", "cuda") if beside is not None else ():
            stack.enter_context(torch.autocast(kind, enabled=False))
        with mode:
            outputs = list(_named(model(*mine), "output"))
        _backward(outputs, nudge)
    results = {name: y.detach().clone() for name, y in outputs if y.is_floating_point()}
    for i, leaf in enumerate(leaves):
        if leaf.grad is not None:
            results[f"input {i}" if len(leaves) > 1 else "input"] = leaf.grad
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    results |= {f"gradient {name}": g.detach().clone() for name, g in grads.items()}
    for name, b in model.named_buffers():
        if b.is_floating_point():
            results[f"buffer {name}"] = b.detach().clone()
        if name in before:
            b.detach().copy_(before[name])
    attributes.restore()  # a cache may hold a tensor of this run's graph
    return _Run(results, log, mode.seen, mode.near)


def _backward(outputs: Sequence[tuple[str, Tensor]], nudge: int) -> None:
    """Go back from gradients that every dtype holds exactly, the same ones in each run.

    But of a float64 model, whose truth is a run of itself: backward in evaluation may not depend on
    the input at all, and would have no error where its own gradients have none.
    """
    roots = [y for _, y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(_SEED)
    drawn = [
        torch.randn(y.shape, generator=generator, device="cpu").bfloat16().to(y) for y in roots
    ]
    drawn = [_nudged(dy, nudge) if dy.dtype is torch.float64 else dy for dy in drawn]
    if roots:
        torch.autograd.backward(roots, drawn)


def _moved(value: Any, exact: bool, nudge: int, leaves: list[Tensor]) -> Any:
    """Copy an input, nested as it may be; its floating tensors become leaves."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value.clone()
        value = _nudged(value.detach().clone(), nudge)
        leaves.append((value.double() if exact else value).requires_grad_())
        return leaves[-1]
    if isinstance(value, (list, tuple)):
        return type(value)([_moved(one, exact, nudge, leaves) for one in value])
    if isinstance(value, dict):
        return {key: _moved(one, exact, nudge, leaves) for key, one in value.items()}
    return value


def _nudged(value: Tensor, nudge: int) -> Tensor:
    """Return a tensor changed by a rounding, each nudge in its way and 0 in none."""
    if not nudge:
        return value
    generator = torch.Generator().manual_seed(nudge)
    signs = torch.rand(value.shape, generator=generator, device="cpu").sub(0.5).sign().to(value)
    return value + signs * value.abs() * torch.finfo(value.dtype).eps


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nested output with names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _named(one, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        keys = getattr(value, "_fields", range(len(value)))
        for key, one in zip(keys, value, strict=True):
            yield from _named(one, f"{name}.{key}")

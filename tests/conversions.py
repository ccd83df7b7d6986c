"""What tests of convert have in common: a model before and after, on the same data in float64.

In float64 PyTorch and the kernels differ by orders of summation alone, about 1e-16 of the terms a
sum; a wrong pattern (a lost residual, an activation twice) is wrong by parts of the value. 1e-9 of
the largest value lies far from both.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from seeds import seeded
from tolerance import assert_as_exact_as_torch
from torch import Tensor, nn

from fastcnn import convert
from fastcnn.convert.converted import Conversion, Converted

NEAR = 1e-9


def images(*sizes: int, seed: int = 0) -> Tensor:
    """Return normal numbers in float64."""
    generator = seeded(seed)
    return torch.randn(sizes, dtype=torch.float64, generator=generator)


def prepared(model: nn.Module) -> nn.Module:
    """Make a model float64, with weights, gammas of both signs and statistics that tell apart."""
    generator = seeded(1)
    model.double()
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point():
            with torch.no_grad():
                t.copy_(torch.randn(t.shape, dtype=t.dtype, generator=generator))
    for name, t in model.named_buffers():
        if name.endswith("running_var"):
            t.abs_().add_(0.5)
    return model


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield the tensors of a nested output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)


def results(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Return outputs, the gradients of all parameters and inputs, and the buffers afterwards."""
    leaves = [t.clone().requires_grad_() for t in tensors_in(inputs)]
    it = iter(leaves)

    def rebuilt(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(it)
        return [rebuilt(v) for v in value] if isinstance(value, list) else value

    model.zero_grad()
    outputs = list(tensors_in(model(*(rebuilt(v) for v in inputs))))
    found = {f"output {i}": y.detach().clone() for i, y in enumerate(outputs)}
    weighted = [(y * images(*y.shape, seed=i + 2)).sum() for i, y in enumerate(outputs)]
    sum(weighted).backward()  # type: ignore[union-attr]
    found |= {f"dx {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
    named = dict(model.named_parameters())
    found |= {f"d {name}": p.grad.clone() for name, p in named.items() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Fail if two results differ by more than orders of summation do."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        size = expected.abs().max().item() if expected.numel() else 0.0
        error = (got[name] - expected).abs().max().item() if expected.numel() else 0.0
        assert error <= NEAR * max(size, 1.0), f"{name}: {error:.1e} beside {size:.1e}"


def assert_converts(model: nn.Module, *inputs: Any, **options: Any) -> list[str]:
    """Convert a model, compare it with itself in training and evaluation; return its patterns.

    Twice in training, so that running statistics of the first call are in the second.
    """
    model = prepared(model)
    before = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert convert(model, **options) is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for training in (True, True, False):
        model.train(training)
        before.train(training)
        assert_same(results(model, *inputs), results(before, *inputs))
    model.train()
    return patterns(model)


def assert_infers(model: nn.Module, x: Tensor) -> list[str]:
    """Convert a model for inference and compare it, in float32, as exactly as PyTorch computes.

    Twice, since the second call finds packed weights; after a change of all weights; in training
    again; and in the other layout.
    """
    model = prepared(model).float()
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    convert(model, mode="infer")
    models = (model, eager, exact)
    with torch.no_grad():
        for call in range(4):
            layout = torch.channels_last if call < 3 else torch.contiguous_format
            data = (x * (1 + call)).to(memory_format=layout)
            for m in models:
                m.eval()
                if call == 2:
                    m.load_state_dict({k: v / 2 for k, v in m.state_dict().items()})
            outputs = [list(tensors_in(m(data.to(t.dtype)))) for m, t in _typed(models)]
            for y, theirs, truth in zip(*outputs, strict=True):
                assert_as_exact_as_torch(f"call {call}", y, theirs, truth)
    assert_same(results(model.double().train(), x), results(exact.train(), x))
    model.eval()
    return patterns(model)


def _typed(models: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, Tensor]]:
    return [(m, next(m.parameters())) for m in models]


def patterns(model: nn.Module) -> list[str]:
    """Return what a model's forward runs as one call, in order, its own code's alone."""
    if not isinstance(model, Converted) or not isinstance(model._fastcnn_conversion, Conversion):
        return []
    plan = model._fastcnn_conversion.current()
    return [] if plan is None else [words for _, words in plan.patterns]


def reasons(model: nn.Module) -> list[str]:
    """Return why parts of a model's forward were left alone."""
    assert isinstance(model, Converted)
    plan = model._fastcnn_conversion.current()
    return [] if plan is None else [why for _, why in plan.left]

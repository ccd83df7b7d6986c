"""What tests of convert have in common: a model before and after, on the same data in float64."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from support.roundings import assert_expected_roundings
from support.seeds import seeded
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert
from fastcnn.convert.converted import Conversion, Converted


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

    def with_leaves(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(it)
        return [with_leaves(v) for v in value] if isinstance(value, list) else value

    model.zero_grad()
    outputs = _outputs(model(*(with_leaves(v) for v in inputs)))
    found = {name: y.detach().clone() for name, y in outputs.items()}
    weighted = [(y * images(*y.shape, seed=i)).sum() for i, y in enumerate(outputs.values(), 2)]
    sum(weighted).backward()  # type: ignore[union-attr]
    found |= {f"dx {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
    named = dict(model.named_parameters())
    found |= {f"d {name}": p.grad.clone() for name, p in named.items() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


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
    """Convert a model for inference and compare it, in float32, with itself in float64.

    Twice, since the second call finds packed weights; after a change of all weights; and in the
    other layout. Then in training, in float64.
    """
    model = prepared(model).float().eval()
    exact = copy.deepcopy(model).double()
    convert(model, mode="infer")
    for call in range(4):
        layout = torch.channels_last if call < 3 else torch.contiguous_format
        data = (x * (1 + call)).float().to(memory_format=layout)
        if call == 2:
            for m in (model, exact):
                m.load_state_dict({k: v / 2 for k, v in m.state_dict().items()})
        with torch.no_grad():
            assert_inferred(model(data), exact, data)
    assert_same(results(model.double().train(), x), results(exact.train(), x))
    model.eval()
    return patterns(model)


def assert_inferred(
    found: Any, exact: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """Compare outputs in evaluation with those of the float64 copy of their model.

    dtype: that convolutions ran in; what they read is rounded to a lower one, folded weights last.
    """

    @torch.no_grad()
    def outputs() -> dict[str, Tensor]:
        return _outputs(exact(x.double()))

    lower = dtype is not torch.float32
    assert_expected_roundings(_outputs(found), outputs, dtype, torch.float32, autocast=lower)


def _outputs(nested: Any) -> dict[str, Tensor]:
    return {f"output {i}": y for i, y in enumerate(tensors_in(nested))}


def patterns(model: nn.Module) -> list[str]:
    """Return what a model's forward runs as one call, in order, its own code's alone."""
    if not isinstance(model, Converted) or not isinstance(model._fastcnn_conversion, Conversion):
        return []
    made = model._fastcnn_conversion.current()
    return [] if made is None else [call.words for call in made.patterns]


def reasons(model: nn.Module) -> list[str]:
    """Return why parts of a model's forward were left alone."""
    assert isinstance(model, Converted)
    made = model._fastcnn_conversion.current()
    return [] if made is None else [one.why for one in made.left]

"""What may change behind a trace: none of it is baked in."""

import argparse
import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from support.conversion_cases import cbr, net
from support.conversions import assert_inferred, images, patterns, prepared, results
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, revert
from fastcnn.convert.converted import Converted, untraceable
from fastcnn.convert.report import rows


@pytest.fixture
def x() -> Tensor:
    return images(2, 4, 5, 5)


def fused(m: Any, x: Tensor) -> Any:
    return m.relu(m.bn(m.conv(x)))


# After the conversion


class Part(nn.Module):
    """A body of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Doubled(Part):
    """The same, doubled."""

    def forward(self, x: Tensor) -> Any:
        return 2 * self.body(x)


def _head(m: Any) -> None:
    m.head = nn.Sigmoid()


def _list(m: Any) -> None:
    m.factors.append(5)


def _dictionary(m: Any) -> None:
    m.named["b"] = 7.0


def _option(m: Any) -> None:
    m.config.scale = 3.0


def _class(m: Any) -> None:
    m.part.__class__ = Doubled


CHANGES = [_head, _list, _dictionary, _option, _class]


def _changeable() -> Any:
    def run(m: Any, x: Tensor) -> list[Tensor]:
        y = m.head(fused(m, m.part(x))) * m.config.scale
        return [*(y * f for f in m.factors), *(y * f for f in m.named.values())]

    model: Any = net(run, head=nn.Identity(), part=Part())
    model.factors, model.named = [2, 3], {"a": 1.0}
    model.config = argparse.Namespace(scale=1.0)
    return prepared(model).eval()


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_trace_has_read_may_change(change: Callable[[Any], None], x: Tensor) -> None:
    model, eager = _changeable(), _changeable()
    convert(model)
    assert patterns(model) == ["conv-bn-relu > conv-bn-relu"]
    change(model), change(eager)
    with pytest.warns(UserWarning, match="has changed since it was converted"):
        assert_same(results(model, x), results(eager, x))
    convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(model, x), results(eager, x))


def test_a_class_may_get_another_forward(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert(prepared(nn.Sequential(Part(), nn.ReLU())).eval())
    before = model(x)
    monkeypatch.setattr(Part, "forward", Doubled.forward)
    with pytest.warns(UserWarning, match="Part has another forward now"):
        assert_same(model(x), 2 * before)


def test_hooks_on_an_identity_run(x: Tensor) -> None:
    model = convert(prepared(net(lambda m, x: m.head(fused(m, x)), head=nn.Identity())))
    seen: list[Any] = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="an Identity has hooks"):
        model(x)
    assert seen


def test_momentum_and_eps_are_read_at_every_call(x: Tensor) -> None:
    model, eager = prepared(cbr(nn.ReLU())), prepared(cbr(nn.ReLU()))
    convert(model)
    for m in (model, eager):
        m[1].momentum, m[1].eps = 0.7, 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(model, x), results(eager, x))


# What a trace cannot repeat

KEPT: list[Tensor] = []


def _keeps(m: Any, x: Tensor) -> Tensor:
    KEPT.append(y := m.part(x))
    return y


def _counts(m: Any, x: Tensor) -> Tensor:
    m.config.calls += 1
    return m.part(x) * m.config.calls


def _prints(m: Any, x: Tensor) -> Tensor:
    print(x.shape)
    return m.part(x)


ODD: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "dtype": (lambda m, x: m.part(x.to(next(m.parameters()).dtype)), "reads dtype"),
    "numpy": (lambda m, x: m.part(x) + 0 * np.random.rand(), "random numbers"),  # noqa: NPY002
    "generator": (lambda m, x: m.part(x) + 0 * m.rng.random(), "random numbers"),
    "kept": (_keeps, "keeps a tensor"),
    "counter": (_counts, "Namespace.calls"),
    "print": (_prints, "prints"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_does_not_repeat_is_not_traced(name: str, x: Tensor) -> None:
    run, why = ODD[name]
    models: Any = [prepared(net(run, part=Part())) for _ in range(2)]
    for m in models:
        m.rng, m.config = random.Random(3), argparse.Namespace(calls=0)
    model, eager = models
    before = np.random.get_state()[2]  # noqa: NPY002
    convert(model)
    assert np.random.get_state()[2] == before  # noqa: NPY002
    assert why in untraceable[model]
    assert patterns(model.part) == ["conv-bn-relu"]
    KEPT.clear()
    for _ in range(2):
        assert_same(results(model, x), results(eager, x))
    assert len(KEPT) in (0, 4)
    assert model.config.calls == eager.config.calls
    assert model.rng.getstate() == eager.rng.getstate()


# Classes and copies


def test_names_of_a_user_s_own(x: Tensor) -> None:
    model: Any = prepared(net(lambda m, x: m.conversion(fused(m, x)), conversion=nn.Sigmoid()))
    model.original_class = "network"
    eager = copy.deepcopy(model)
    convert(model)
    assert_same(results(copy.deepcopy(model), x), results(eager, x))
    assert model.original_class == "network"


def test_registries_of_classes_keep_what_they_have() -> None:
    known: dict[str, type] = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, name: str, **more: Any) -> None:
            known[name] = cls

    class Network(Registered, name="network"):
        def __init__(self) -> None:
            super().__init__()
            self.body = cbr()

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

    assert isinstance(convert(Network()), Converted)
    assert known == {"network": Network}


def test_shallow_copies(x: Tensor) -> None:
    model = convert(prepared(cbr(nn.ReLU())).eval())
    eager = copy.copy(model)
    assert patterns(eager) == ["conv-bn-relu"]
    assert eager[0] is model[0]
    assert_same(eager(x), model(x))


def test_copies_of_what_has_changed_since(x: Tensor) -> None:
    model: Any = convert(prepared(nn.Sequential(cbr(nn.ReLU()), Part())).eval())
    model.forward = lambda x: 2 * model[0](x)
    copied = copy.deepcopy(model)
    whole, child = rows(copied)[:2]
    assert "a forward of its own" in whole.reason
    assert child.pattern == "conv-bn-relu"
    assert_same(copied(x), model(x))


def test_scripted_children_are_called(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        part = torch.jit.script(cbr())
    model = prepared(nn.Sequential(cbr(nn.ReLU()), part)).eval()
    want = model(x)
    convert(model)
    assert patterns(model) == ["conv-bn-relu"]
    assert_same(model(x), want)


@pytest.mark.parametrize("change", [lambda m: revert(m[0]), lambda m: convert(m[0], "infer")])
def test_again_after_a_part_was_changed(change: Callable[[Any], Any]) -> None:
    model: Any = convert(nn.Sequential(cbr(nn.ReLU()), cbr()))
    change(model)
    convert(model)
    assert isinstance(model[0], Converted)
    assert model[0]._fastcnn_conversion.options.mode == "train"


# Transforms, and what is kept for inference


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func.jvp's own
def test_vmap_and_forward_mode(x: Tensor) -> None:
    model, eager = convert(prepared(cbr(nn.ReLU())).eval()), prepared(cbr(nn.ReLU())).eval()

    def gradients(m: Any) -> Any:
        def loss(p: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(m, p, (x[None],)).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(dict(m.named_parameters()), x)

    assert_same(gradients(model), gradients(eager))
    got, want = (torch.func.jvp(m, (x,), (x,)) for m in (model, eager))
    assert_same(got, want)
    both = torch.stack([x, 2 * x])
    assert_same(torch.vmap(model)(both), torch.vmap(eager)(both))


def test_optimizers_that_write_to_data(x: Tensor) -> None:
    model = convert(prepared(cbr(nn.ReLU())), mode="infer")
    x = x.to(memory_format=torch.channels_last)

    def inferred() -> Tensor:
        with torch.no_grad():
            return model.eval()(x)

    model.float()
    x = x.float()
    inferred()
    model.train()(x).sum().backward()
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-0.1)
    assert_inferred(inferred(), revert(copy.deepcopy(model)).double(), x)


def test_a_residual_that_a_layer_has_kept_is_left_as_it_is(x: Tensor) -> None:
    class Keeping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = x
            return x * 1

    def run(m: Any, x: Tensor) -> Any:
        y = fused(m, x)
        z = m.keeping(y)
        return y.clone(), z, m.relu(m.bn2(m.conv2(m.part(y))) + y)

    model: Any = prepared(net(run, keeping=Keeping(), part=cbr(nn.ReLU()))).float().eval()
    convert(model, mode="infer")
    with torch.no_grad():
        before, _, _ = model(x.float().to(memory_format=torch.channels_last))
    assert torch.equal(model.keeping.kept, before)


def test_converted_again_after_a_parametrization() -> None:
    # Which derives a class of the converted one: the next conversion is of what it is then.
    model = convert(nn.Sequential(net(lambda m, x: m.relu(m.bn(m.conv(x)))), cbr(nn.ReLU())))
    block: Any = model[0]
    block.scale = nn.Parameter(torch.ones(3))
    parametrize.register_parametrization(block, "scale", nn.Identity())
    convert(model)
    x = images(2, 4, 8, 8).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert [(row.fused, row.reason) for row in rows(model)] == [(True, "")]  # a chain of two
    assert type(revert(model)[0]).__name__ == "ParametrizedForward"

"""convert beside all else that a model may be: shared, frozen, traced or not, changed later."""

import copy
import math
import random
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import Forward, bn, cbr, conv, net
from support.conversions import (
    assert_converts,
    images,
    patterns,
    prepared,
    reasons,
    results,
)
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, report, revert
from fastcnn.convert import fused_forward
from fastcnn.convert.converted import Converted, untraceable


@pytest.fixture
def x() -> Tensor:
    return images(3, 4, 6, 8)


# Parameters and layers that are used in more than one place, or not as usual


def test_layers_used_twice(x: Tensor) -> None:
    model = net(lambda m, x: m.relu(m.bn(m.conv(m.relu(m.bn(m.conv(x)))))))
    assert assert_converts(model, x) == ["conv-bn-relu > conv-bn-relu"]


def test_one_convolution_before_two_batch_norms(x: Tensor) -> None:
    model = net(lambda m, x: m.relu(m.bn(m.conv(x))) * m.bn2(m.conv(x.tanh())))
    assert assert_converts(model, x) == ["conv-bn-relu", "conv-bn"]


def test_shared_parameters(x: Tensor) -> None:
    model = nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))
    model[1][0].weight = model[0][0].weight
    model[1][1].bias = model[0][1].bias
    assert_converts(model, x)
    assert model[1][0].weight is model[0][0].weight


def test_a_block_used_twice_is_one_conversion(x: Tensor) -> None:
    block = cbr(nn.ReLU())
    model = nn.Sequential(block, nn.Tanh(), block)
    assert assert_converts(model, x) == ["conv-bn-relu", "conv-bn-relu"]


@pytest.mark.parametrize("gamma", [0.0, -1.5])
def test_gammas_of_any_sign(gamma: float, x: Tensor) -> None:
    model = prepared(cbr(nn.ReLU()))
    nn.init.constant_(model[1].weight, gamma)
    before = results(model, x)
    assert_same(
        results(convert(model), x) | dict(model.named_buffers()),
        before | dict(model.named_buffers()),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"track_running_stats": False},
        {"affine": False},
        {"momentum": None},  # the cumulative average
        {"momentum": None, "affine": False},
    ],
)
def test_batch_norms_without_some_of_it(options: dict[str, Any], x: Tensor) -> None:
    assert_converts(nn.Sequential(conv(), bn(**options), nn.ReLU()), x)


def test_sync_batch_norm_alone_is_batch_norm(x: Tensor) -> None:
    # PyTorch's own refuses the CPU in training; alone in its group it is BatchNorm2d.
    plain = prepared(cbr(nn.ReLU()))
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(prepared(cbr(nn.ReLU())))
    assert type(sync[1]) is nn.SyncBatchNorm
    convert(sync)
    assert patterns(sync) == ["conv-bn-relu"]
    assert_same(results(sync, x), results(plain, x))


def test_frozen_parts(x: Tensor) -> None:
    model = prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU())))
    eager = prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU())))
    for m in (model, eager):
        m[0].requires_grad_(False)
        m[0][1].eval()  # its statistics stay, in a model that trains
    convert(model)
    got, want = results(model, x), results(eager, x)
    assert "d 0.0.weight" not in got
    assert torch.equal(got["0.1.running_mean"], eager[0][1].running_mean)
    assert_same(got, want)


def test_flags_that_differ_within_a_model(x: Tensor) -> None:
    """A part in evaluation: F.dropout there must not drop, in whatever order flags are set."""

    def part() -> nn.Module:
        return net(lambda m, x: F.dropout(m.relu(m.bn(m.conv(x))), 0.5, m.training))

    model = prepared(nn.Sequential(part(), part()))
    eager = prepared(nn.Sequential(part(), part()))
    convert(model)
    for flags in [(True, False), (False, False), (False, True)]:
        for m in (model, eager):
            m[0].train(flags[0]), m[1].train(flags[1])
        zeros = [(model[i](images(2, 4, 64, 64)) == 0).double().mean().item() for i in (0, 1)]
        expected = [(eager[i](images(2, 4, 64, 64)) == 0).double().mean().item() for i in (0, 1)]
        # Two draws of 32768 elements differ by a deviation of at most sqrt(2 / 4 / 32768); by
        # 6 of them in one of 5e8 draws.
        for got, want in zip(zeros, expected, strict=True):
            assert abs(got - want) < 6 * math.sqrt(0.5 / 32768)
    model.eval(), eager.eval()
    assert_same(results(model, x), results(eager, x))


def test_other_flags_are_traced_when_they_come(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each trace takes as long as the one that convert makes, for a call that may never come.
    traced: list[bool] = []
    trace = fused_forward.trace
    monkeypatch.setattr(
        fused_forward, "trace", lambda m, *more: traced.append(m.training) or trace(m, *more)
    )
    model = prepared(net(lambda m, x: F.dropout(m.relu(m.bn(m.conv(x))), 0.5, m.training)))
    convert(model)
    assert (model(x) == 0).any()
    assert traced == [True]
    eager = prepared(net(lambda m, x: m.relu(m.bn(m.conv(x)))))
    eager.load_state_dict(model.state_dict())
    assert_same(model.eval()(x), eager.eval()(x))
    model.train()(x), model.eval()(x)
    assert traced == [True, False]


@pytest.mark.parametrize("training", [True, False])
def test_flags_with_nothing_to_fuse_hide_no_others(training: bool, x: Tensor) -> None:
    model = net(lambda m, x: m.relu(m.bn(m.conv(x))) if m.training is training else m.conv(x))
    eager = prepared(copy.deepcopy(model)).train(training)
    model = convert(prepared(model).train(not training))
    assert not report(model)  # a convolution alone, now
    assert report(model.train(training))[0].fused
    assert_same(model(x), eager(x))


# Forwards that a trace would get wrong


class Counting(Forward):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x) * self.calls


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.b(y)


def _saved_elsewhere(m: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return m.a(x)


def _branch(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if x.sum() > 0 else m.b(x)


UNTRACED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "data": (_branch, "control flow"),
    "shape": (lambda m, x: m.a(x) if x.shape[0] > 2 else m.b(x), "control flow"),
    "no_grad": (_no_grad, "gradients or autocast"),
    "saved tensors": (_saved_elsewhere, "in a context such as"),
    "python's random": (lambda m, x: m.a(x) * (1 + 0 * random.random()), "random"),
    "torch's random": (lambda m, x: m.a(x) + 0 * torch.rand(1), "computes rand"),
    "own tensors": (lambda m, x: m.a(x) + torch.ones(8), "computes ones"),
    "modes": (
        lambda m, x: m.a(x) if torch.is_grad_enabled() else m.b(x),
        "gradients or autocast",
    ),
    "checkpoint": (
        lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False),
        "control flow",
    ),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_what_does_not_trace_runs_as_written(name: str, x: Tensor) -> None:
    """Its children are fused by themselves; nothing of the forward is baked in."""
    run, why = UNTRACED[name]
    model = Forward(run, a=cbr(nn.ReLU()), b=cbr(nn.Sigmoid()))
    # A checkpoint runs its part once more in backward, which would move PyTorch's statistics twice.
    model.a[1].momentum = 0.0
    assert assert_converts(model, x) == []
    assert patterns(model.a) == ["conv-bn-relu"]
    assert why in untraceable[model]
    model.eval()
    assert_same(results(model, -x), results(revert(copy.deepcopy(model)), -x))


def test_what_is_computed_of_parameters_is_computed_anew(x: Tensor) -> None:
    model = net(
        lambda m, x: m.relu(m.bn(m.conv(x))) * m.bn2.weight.sum().item() + m.bn2.bias.abs()[0]
    )
    assert assert_converts(model, x) == ["conv-bn-relu"]
    y = model(x)
    nn.init.zeros_(model.bn2.weight)
    nn.init.constant_(model.bn2.bias, -3.0)
    assert torch.equal(model(x), torch.full_like(y, 3.0))


def test_a_forward_that_counts_its_calls(x: Tensor) -> None:
    model = Counting(lambda m, x: m.a(x), a=cbr(nn.ReLU()))
    assert_converts(model, x)
    assert model.calls == 3
    assert "changes the attribute Counting.calls" in untraceable[model]


def test_containers_of_any_class_that_a_forward_leaves_alone(x: Tensor) -> None:
    model = net(lambda m, x: m.a(x), a=cbr(nn.ReLU()))
    kinds = (list, dict, set)
    for kind in kinds:
        setattr(model, kind.__name__, type("Own", (kind,), {})())
    assert assert_converts(model, x) == ["conv-bn-relu"]


@pytest.mark.parametrize("empty", [[], {}, set(), None])
def test_what_a_trace_changes_is_put_back(empty: Any) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.seen = [1] if empty is None else type(empty)([(1, 2)])
        m.filled.append(1)
        return m.a(x)

    model = net(forward, a=cbr(nn.ReLU()))
    held = model.filled = []
    if empty is not None:
        model.seen = empty
    convert(model)
    assert "changes the attribute" in untraceable[model]
    assert model.filled is held == []
    assert getattr(model, "seen", None) is empty


class _Holder:
    n = 0


STATE: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "deque": (deque(maxlen=2), lambda q, y: q.append(y)),
    "list in a dictionary": ({"a": []}, lambda d, y: d["a"].append(y)),
    "dictionary in a tuple": (({},), lambda t, y: t[0].update({len(t[0]): y})),
    "object in a list": ([_Holder()], lambda o, y: vars(o[0]).update(n=o[0].n + y)),
    "object in an object": (
        SimpleNamespace(o=_Holder()),
        lambda o, y: vars(o.o).update(n=o.o.n + y),
    ),
}


def _total(held: Any) -> Any:
    if isinstance(held, (_Holder, SimpleNamespace)):
        return sum(map(_total, vars(held).values()))
    parts = held.values() if isinstance(held, dict) else held
    return sum(map(_total, parts)) if isinstance(held, (list, tuple, dict, deque)) else held


@pytest.mark.parametrize("of_tensors", [True, False])
@pytest.mark.parametrize("name", STATE)
def test_what_a_forward_adds_to(name: str, of_tensors: bool, x: Tensor) -> None:
    """As a video model's memory: a trace leaves nothing in it, and its length is no constant."""
    held, add = STATE[name]

    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        add(m.held, y.detach() if of_tensors else 1)
        return y + _total(m.held)

    model = prepared(net(forward, a=cbr(nn.ReLU())))
    model.held = copy.deepcopy(held)
    eager = copy.deepcopy(model)
    convert(model)
    assert model in untraceable
    for _ in range(3):
        assert_same(model(x), eager(x))


def test_a_forward_that_renames_an_attribute(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        first = "first" in vars(m)
        old, new = ("first", "second") if first else ("second", "first")
        vars(m)[new] = vars(m).pop(old)
        return m.a(x) * (2 if first else 3)

    model = prepared(net(forward, a=cbr(nn.ReLU())))
    model.first = None
    eager = copy.deepcopy(model)
    convert(model)
    for _ in range(3):
        assert_same(model(x), eager(x))


def test_a_forward_of_the_module_s_own(x: Tensor) -> None:
    model = prepared(net(lambda m, x: m.relu(m.bn(m.conv(x))), part=cbr(nn.ReLU())))
    model.forward = lambda x: model.part(x) * 2
    before = model.eval()(x)
    convert(model)
    assert_same(model(x), before)
    assert patterns(model.part) == ["conv-bn-relu"]
    assert "a forward of its own" in untraceable[model]


def test_a_list_of_inputs_is_traced_from_above(x: Tensor) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu = bn(8), nn.ReLU()

        def forward(self, parts: Any) -> Tensor:
            if isinstance(parts, Tensor):
                parts = [parts]
            return self.relu(self.bn(torch.cat(parts, 1)))

    model = net(lambda m, x: m.dense([x, m.conv(x)]), dense=Dense())
    assert assert_converts(model, x) == ["cat-batch_norm-relu"]
    # By itself it runs as it was traced for a tensor, and as written for a list.
    one = torch.cat([x, x], 1)
    assert_same(model.dense(one), model.dense([x, x]))


def test_writing_into_an_input_is_seen(x: Tensor) -> None:
    """A fused call reads its inputs last: nobody may change them before it has."""

    def run(m: Any, x: Tensor) -> Tensor:
        z = torch.tanh(x)
        y = m.conv(z)
        z.mul_(3)
        return m.relu(m.bn(y)) + z

    # In training PyTorch itself refuses: the convolution's backward needs what is overwritten.
    model = prepared(net(run))
    with torch.no_grad():
        before = model(x)
        convert(model)
        assert patterns(model) == ["batch_norm-relu"]
        assert any("mul" in why for why in reasons(model))
        assert_same(model(x), before)


def test_an_addition_that_overwrites_a_value_in_use(x: Tensor) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        z = x + 1
        view = z.view(z.shape)
        z += m.bn(m.conv(x))
        return m.relu(z) * view

    assert assert_converts(net(run), x) == ["conv-bn"]


def test_an_addition_that_overwrites_a_dead_value(x: Tensor) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        z = x + 1
        z += m.bn(m.conv(x))
        return m.relu(z)

    assert assert_converts(net(run), x) == ["conv-bn + residual - relu"]


# Hooks, and changes after conversion


@contextmanager
def warned(match: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    assert any(re.search(match, str(one.message)) for one in said), [str(w.message) for w in said]


def seen_by(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    return seen


@pytest.mark.parametrize("layer", ["0.0", "0.1", "1.2"])
def test_hooks_on_inner_layers_are_left_alone(layer: str, x: Tensor) -> None:
    model, eager = (prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))) for _ in range(2))
    seen, expected = seen_by(model.get_submodule(layer)), seen_by(eager.get_submodule(layer))
    convert(model)
    assert_same(results(model, x), results(eager, x))
    assert_same(seen, expected)
    if layer != "1.2":  # of an activation: the rest of its step is fused
        assert any("forward hooks" in why for why in reasons(model))


def test_hooks_on_containers_run(x: Tensor) -> None:
    model, eager = (prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))) for _ in range(2))
    seen, expected = seen_by(model[0]), seen_by(eager[0])
    convert(model)
    assert_same(results(model, x), results(eager, x))
    assert_same(seen, expected)
    assert patterns(model) == ["conv-bn-relu"]  # the second container's
    assert patterns(model[0]) == ["conv-bn-relu"]


@pytest.mark.parametrize("layer", ["0", "0.1", "1.2"])
def test_hooks_that_come_later_run_too(layer: str, x: Tensor) -> None:
    model, eager = (prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))) for _ in range(2))
    convert(model)
    seen, expected = seen_by(model.get_submodule(layer)), seen_by(eager.get_submodule(layer))
    with warned("the model has changed since it was converted .* has hooks now"):
        got = results(model, x)
    assert_same(got, results(eager, x))
    assert_same(seen, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # said once


def _replace(m: Any) -> None:
    m[0][2] = nn.Sigmoid()


def _remove(m: Any) -> None:
    m[1] = nn.Identity()


def _attribute(m: Any) -> None:
    m[0][2] = nn.LeakyReLU()
    m[0][2].negative_slope = 0.5


def _forward(m: Any) -> None:
    m[0][0].forward = lambda x: 2 * nn.Conv2d.forward(m[0][0], x)


@pytest.mark.parametrize("change", [_replace, _remove, _attribute, _forward])
def test_changes_after_conversion_take_effect(change: Callable[[Any], None], x: Tensor) -> None:
    model, eager = (prepared(nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))) for _ in range(2))
    convert(model)
    change(model), change(eager)
    with warned("convert it again"):
        got = results(model, x)
    assert_same(got, results(eager, x))
    convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(model, x), results(eager, x))


def test_a_new_head_needs_no_conversion(x: Tensor) -> None:
    """A layer that no call has absorbed may be replaced, as in fine-tuning."""
    model = prepared(
        net(lambda m, x: m.fc(m.relu(m.bn(m.conv(x))).mean((2, 3))), fc=nn.Linear(4, 9))
    )
    convert(model)
    model.fc = nn.Linear(4, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(x).shape == (3, 2)


def test_attributes_of_a_forward_may_change(x: Tensor) -> None:
    model = prepared(net(lambda m, x: m.relu(m.bn(m.conv(x))) * m.scale))
    model.scale = 2.0
    convert(model)
    y = model(x)
    model.scale = 6.0
    model.bn.eval()
    model.bn.train()
    with warned(r"Forward.scale was 2.0 and is 6.0 now"):
        assert_same(model(x), 3 * y)


def test_global_hooks_see_every_layer(x: Tensor) -> None:
    model = prepared(cbr(nn.ReLU()))
    convert(model)
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: names.append(type(m).__name__)
    )
    try:
        with warned("hooks on all modules"):
            model(x)
    finally:
        handle.remove()
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "Sequential"]
    assert isinstance(model, Converted)

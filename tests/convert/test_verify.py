"""fastcnn.verify(model, x): that a defect is found where it is, and rounding is not one."""

import copy
import random
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from support.conversion_cases import Branch, Forward
from support.oracles import torchvision_resnet
from support.seeds import seed_all, seeded
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, functional, revert, verify
from fastcnn.convert.verify.capture import Place
from fastcnn.convert.verify.determinism import Comparable
from fastcnn.convert.verify.difference import FACTOR, FACTORS, difference
from fastcnn.convert.verify.verify import _RUNS
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d

Pair = namedtuple("Pair", ["left", "right"])  # as torchvision's outputs


def cbr(c_in: int, c_out: int) -> nn.Sequential:
    layers = nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()
    return nn.Sequential(*layers)


def four() -> nn.Sequential:
    """Four chains, told apart by their channels: the tanh between them keeps them apart."""
    layers = [cbr(3, 8), nn.Tanh(), cbr(8, 5), nn.Tanh(), cbr(5, 6), nn.Tanh(), cbr(6, 7)]
    with torch.random.fork_rng():
        seed_all(0)
        return nn.Sequential(*layers)


def images(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=seeded(0))


X = images(2, 3, 12, 12)


class _Off(torch.autograd.Function):
    """x, and a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy * 1.01


Defect = Callable[..., Tensor]


def plant(monkeypatch: pytest.MonkeyPatch, c_out: int, defect: Defect) -> None:
    """Let the chain that ends in so many channels run with a defect."""
    real = functional.conv_bn_act

    def planted(x: Tensor, steps: Any, *args: Any, **kwargs: Any) -> Tensor:
        if steps[-1].weight.shape[0] != c_out:
            return real(x, steps, *args, **kwargs)
        return defect(lambda x: real(x, steps, *args, **kwargs), x)

    monkeypatch.setattr(functional, "conv_bn_act", planted)


@pytest.mark.parametrize("training", [True, False])
def test_rounding_is_no_difference(training: bool, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(convert(four()).train(training), X)
    assert result.ok
    assert result.first is None
    values = [(row.place, row.pattern) for row in result.rows if row.what == "forward"]
    chain, tanh = "conv-bn-relu", "Tanh"
    assert values == [
        ("0: 0 .. 2", chain), ("1", tanh), ("2: 0 .. 2", chain), ("3", tanh), ("4: 0 .. 2", chain),
        ("5", tanh), ("6: 0 .. 2", chain),
    ]  # fmt: skip
    gradients = [row.place for row in result.rows if row.what == "backward"]
    assert gradients == [place for place, _ in reversed(values)]
    named = {row.place for row in result.rows if row.what == "gradient"}
    assert named == {f"gradient {name}" for name, _ in four().named_parameters()}
    assert {"output", "input", "buffer 0.1.running_var"} <= {row.place for row in result.rows}
    printed = capsys.readouterr().out
    assert printed == f"{result}\n"
    verdict, scale, *head = printed.strip().splitlines()[:4]
    assert verdict.startswith("no difference above rounding in")
    assert scale.startswith("errors against float64, as parts of each value's norm")
    three = ["fastcnn", "PyTorch", "limit"]
    assert " ".join(head).split() == ["forward", "backward", "place", "pattern", *three, *three]
    assert max(map(len, printed.splitlines())) <= 100


def test_chance_is_not_taken_for_a_difference() -> None:
    # Once in 1e9 places, of one value or of many; a factor has two digits.
    for m, factor in enumerate(FACTORS, 1):
        assert 0.8e-9 < scipy.stats.f.sf(factor**2, m, _RUNS * m) < 1.2e-9, m
    for m in range(len(FACTORS) + 1, 1000):
        assert scipy.stats.f.sf(FACTOR**2, m, _RUNS * m) < 1e-9, m


def test_few_values_may_differ_by_more() -> None:
    place = Place("a", "b")
    for sizes, factor in [((), 1301.6), ((2, 3, 7, 8), 19.2), ((11, 2, 3, 3), 4), ((64,), 4)]:
        exact = torch.ones(sizes).double()
        row = difference(place, "forward", (), exact, [exact + 0.1] * _RUNS, exact, exact)
        assert row.limit == pytest.approx(factor * 0.1)


@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_value_is_found_at_its_call(
    training: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = convert(four()).train(training)
    plant(monkeypatch, 6, lambda run, x: run(x) * 1.01)
    result = verify(model, X)
    assert result.first is not None
    assert (result.first.place, result.first.what) == ("4: 0 .. 2", "forward")
    assert result.first.suspects == ("4: 0 .. 2",)
    # The defect, and the rounding that the value may have without it.
    assert abs(result.first.ours - 0.01) <= 1.01 * result.first.limit
    assert "the first difference above rounding arises in 4: 0 .. 2: forward" in (
        " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_a_wrong_gradient_is_found_at_its_call(
    training: bool, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return _Off.apply(run(x)) if behind else run(_Off.apply(x))

    model = convert(four()).train(training)
    plant(monkeypatch, 6, defect)
    first = verify(model, X).first
    assert first is not None
    assert (first.place, first.what) == ("3", "backward")  # the value that it reads
    assert first.suspects == ("4: 0 .. 2",)


def test_a_wrong_gradient_of_a_parameter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = functional.conv_bn_act

    def planted(x: Tensor, steps: Any, *args: Any, **kwargs: Any) -> Tensor:
        if steps[0].weight.shape[0] == 5:
            steps = [steps[0]._replace(weight=_Off.apply(steps[0].weight))]
        return real(x, steps, *args, **kwargs)

    model = convert(four())
    monkeypatch.setattr(functional, "conv_bn_act", planted)
    first = verify(model, X).first
    assert first is not None
    assert (first.place, first.what) == ("gradient 2.0.weight", "gradient")


def test_a_wrong_layer_in_what_does_not_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = {f"norm{i}": nn.GroupNorm(2, 8) for i in range(3)}
    model = convert(nn.Sequential(cbr(3, 8), Branch(**norms), cbr(8, 5)))
    assert verify(model, X).ok
    real, calls = functional.group_norm_act, []

    def planted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return real(*args, **kwargs) * (1.01 if len(calls) % 3 == 2 else 1.0)

    monkeypatch.setattr(functional, "group_norm_act", planted)
    first = verify(model, X).first
    assert first is not None
    assert (first.place, first.pattern, first.what) == ("1.norm1", "group_norm", "forward")


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert(four())
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(model, X).ok
        plant(monkeypatch, 6, lambda run, x: run(x) * 1.1)
        first = verify(model, X).first
    assert first is not None
    assert first.place == "4: 0 .. 2"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, {"b": b}],
        lambda a, b: {"a": a, "b": b},
        lambda a, b: Pair(a, b),
    ],
)
def test_outputs_of_all_kinds(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    model = Forward(lambda m, x: wrap(m.a(x), m.b(x)), a=cbr(3, 4), b=cbr(3, 5))
    result = verify(convert(model), X)
    assert result.ok
    assert sum(row.what == "output" for row in result.rows) == 2


def test_inputs_of_all_kinds() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = cbr(3, 4), nn.Embedding(5, 4)

        def forward(self, x: Tensor, classes: Tensor) -> Tensor:
            return self.body(x) + self.table(classes)[:, :, None, None]

    result = verify(convert(Two()), (X, torch.tensor([1, 4])))
    assert result.ok
    assert [row.place for row in result.rows if row.what == "input"] == ["input"]


def test_the_model_stays_as_it_is() -> None:
    model = convert(four())
    model[2][0].weight.requires_grad_(False)
    model[4].eval()
    model(X).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    attributes = [dict(m.__dict__) for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    x = X.clone()
    assert verify(model, x).ok
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(x, X)
    assert x.grad is None
    assert [dict(m.__dict__) for m in model.modules()] == attributes
    assert [type(m) for m in model.modules()] == classes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in gradients)
        assert p.grad is None or torch.equal(p.grad, gradients[name])


def test_folded_weights_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert(four().eval(), mode="infer")
    assert verify(model, X).ok
    real = FoldedConv2d._run

    def planted(self: Any, state: Any, x: Tensor, *args: Any) -> Any:
        run, factor = real(self, state, x, *args), 1.01 if x.shape[1] == 5 else 1.0
        return lambda *given: run(*given) * factor

    monkeypatch.setattr(FoldedConv2d, "_run", planted)
    first = verify(convert(four().eval(), mode="infer"), X).first
    assert first is not None
    assert (first.place, first.what) == ("4: 0 .. 2", "forward")


def test_blocks_of_a_stage_are_one_place() -> None:
    small = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 2, 1, 1])
    result = verify(convert(small, memory="low"), images(2, 3, 32, 32))
    assert result.ok
    assert sum("2 blocks" in row.pattern for row in result.rows) == 2


def test_dropout_and_random_numbers_are_alike() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = F.dropout(m.drop(m.body(x)), 0.5, m.training)
        return y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.5) + torch.randn(())

    model = convert(Forward(run, body=cbr(3, 4), drop=nn.Dropout(0.5)))
    assert verify(model, X).ok


def test_a_jump_of_the_derivative_is_no_difference() -> None:
    """Half the activations at relu's jump but for rounding: their gradients are a coin's throw."""
    model = four()
    with torch.no_grad():
        model[0][1].weight[:4] = 1e-9
    model.eval()
    assert verify(convert(model), X).ok


JUMPS: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float], list[float]]] = {
    # The function, its inputs, their derivatives, and those of the other side.
    "relu": (F.relu, [1e-12, 1, -1], [1, 1, 0], [0, 1, 0]),
    "method": (lambda x: x.relu(), [-1e-12, 1, -1], [0, 1, 0], [1, 1, 0]),
    "in place": (lambda x: F.relu(x, inplace=True), [1e-12, 1, -1], [1, 1, 0], [0, 1, 0]),
    "relu_": (lambda x: x.relu_(), [1e-12, 1, -1], [1, 1, 0], [0, 1, 0]),
    "relu6": (F.relu6, [6 - 1e-12, 6.1, 3], [1, 0, 1], [0, 0, 1]),
    "module": (nn.ReLU6(inplace=True), [6 + 1e-12, 6.1, 3], [0, 0, 1], [1, 0, 1]),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), [1e-12, 1, -1], [1, 1, 0.1], [0.1, 1, 0.1]),
    "hardswish": (F.hardswish, [3 - 1e-12, 4, -4], [1.5, 1, 0], [1, 1, 0]),
    "max pool": (
        lambda x: F.max_pool2d(x.view(1, 1, 1, 3), (1, 3)).view(1),
        [1.0, 1 + 1e-12, 0],
        [0, 1, 0],
        [1, 0, 0],
    ),
}


@pytest.mark.parametrize("name", JUMPS)
def test_the_other_side_of_a_jump(name: str) -> None:
    run, values, here, there = JUMPS[name]
    rough = torch.tensor(values)
    for other_side, expected in ((False, here), (True, there)):
        x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        with Comparable([rough.view(1, 1, 1, 3) if "pool" in name else rough], other_side) as mode:
            z = x * 1.0
            y = run(z)
        y.sum().backward()
        assert mode.near == 1
        assert torch.equal(y.detach(), run(x.detach().clone()))
        if "in place" in name or name in ("relu_", "module"):
            assert torch.equal(z, y)
        assert x.grad is not None
        assert_same(x.grad, torch.tensor(expected, dtype=torch.float64))


def test_what_is_not_finite_is_not_compared() -> None:
    """Not a word of rounding where there is no number to compare."""
    x = X.clone()
    x[0, 0, 0, 0] = float("nan")
    found = verify(convert(four()), x)
    unknown = [row for row in found.rows if not row.torch < float("inf")]
    compared = len(found.rows) - len(unknown)
    assert unknown
    words = (
        f"no difference above rounding in {compared} values; dropout ran with p=0; of "
        f"{len(unknown)} more nothing can be said, the first at {unknown[0].place}: PyTorch's are "
        "not finite"
    )
    assert str(found).replace("\n  ", " ").startswith(words)


def test_what_cannot_be_verified() -> None:
    with pytest.raises(TypeError, match=r"verify: model: expected a torch\.nn\.Module, got str"):
        verify("resnet18", X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing in it is converted"):
        verify(revert(convert(four())), X)
    single = Forward(lambda m, x: m.body(x.float()), body=cbr(3, 4))
    with pytest.raises(ValueError, match="the model does not run in float64"):
        verify(convert(single), X)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_float64_model_in_evaluation(mode: Any) -> None:
    """Its truth is a run of itself, whose backward does not depend on the input's roundings."""
    with torch.random.fork_rng():
        seed_all(0)
        model = torchvision_resnet.resnet18().double().eval()
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert verify(convert(model, mode=mode), x).ok


def test_a_model_that_keeps_a_tensor_for_its_next_call() -> None:
    """As attention biases are in evaluation: of a graph that is gone when the next run comes."""

    def run(m: Any, x: Tensor) -> Tensor:
        if "scale" not in m.kept:
            m.kept["scale"] = m.weight.exp()
        return m.body(x) * m.kept["scale"]

    model = Forward(run, body=cbr(3, 4))
    model.weight, model.kept = nn.Parameter(torch.zeros(1)), {}
    assert verify(convert(model), X).ok
    assert model.kept == {}

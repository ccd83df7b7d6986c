"""What a trace has read of the modules is compared at each call, and nothing else is."""

import copy
import enum
import functools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import bn, cbr, net
from support.conversions import images, patterns, prepared, results
from support.oracles import timm
from support.tolerance import assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastcnn import convert
from fastcnn.common.checks import one_of
from fastcnn.convert.converted import Converted


class Way(enum.Enum):
    """An option."""

    PLAIN = 1
    DOUBLED = 2


class Reader(nn.Module):
    """Reads in as many ways as there are."""

    doubles = False  # of the class, as ultralytics' Detect.export
    shared: ClassVar[dict[str, float]] = {"scale": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([cbr(nn.ReLU()), cbr(nn.ReLU())])
        self.rest = nn.Sequential(cbr(), nn.ReLU())
        self.drop = nn.Dropout(0.0)
        self.act: Any = torch.tanh
        self.way, self.taken = Way.PLAIN, {"a"}
        self.options = SimpleNamespace(inner=SimpleNamespace(scale=1.0))
        self.scale = functools.partial(torch.mul, other=1.5)
        self.type, self.half = "plain", 1.0  # names that nn.Module has for methods
        self.inner, self.head = cbr(nn.ReLU()), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        for layer in self.rest:
            x = layer(x)
        x = F.dropout(x, self.drop.p, self.drop.training) * self.options.inner.scale
        x = x * 2 if self.doubles or hasattr(self, "late") else x
        x = x * self.shared["scale"] * (2 if self.type == "doubled" else 1) * self.half
        x = x * 2 if hasattr(self, "buffer") or hasattr(self, "weight") else x
        x = self.inner.forward(x)  # by its name, without hooks
        x = self.head(x) if isinstance(self.head, nn.Conv2d) else x
        x = x * 2 if self.way is Way.DOUBLED or "b" in self.taken else x
        return self.scale(self.act(x))


def _another(m: Any) -> nn.Module:
    torch.manual_seed(5)
    return cbr(nn.ReLU()).to(next(m.parameters()).dtype)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a stage more": lambda m: m.stages.append(_another(m)),
    "a stage before": lambda m: m.stages.insert(0, _another(m)),
    "another stage": lambda m: m.stages.__setitem__(1, _another(m)),
    "a stage less": lambda m: m.stages.__delitem__(0),
    "another list": lambda m: setattr(m, "stages", nn.ModuleList([_another(m)])),
    "a layer more": lambda m: m.rest.append(nn.Sigmoid()),
    "another layer": lambda m: m.rest.__setitem__(1, nn.Sigmoid()),
    "the other order": lambda m: m.rest._modules.update({"0": m.rest._modules.pop("0")}),
    "a function": lambda m: setattr(m, "act", torch.sigmoid),
    "an enumeration": lambda m: setattr(m, "way", Way.DOUBLED),
    "a set": lambda m: m.taken.add("b"),
    "an object's object": lambda m: setattr(m.options.inner, "scale", 3.0),
    "a value that hides the class's": lambda m: setattr(m, "doubles", True),
    "a value that was not there": lambda m: setattr(m, "late", 0),
    "a partial": lambda m: setattr(m, "scale", functools.partial(torch.mul, other=2.5)),
    "a name of a method": lambda m: setattr(m, "type", "doubled"),
    "a value with the name of one": lambda m: setattr(m, "half", 0.5),
    "a buffer that was not there": lambda m: m.register_buffer(
        "buffer", torch.ones(1, dtype=torch.float64)
    ),
    "a parameter that was not there": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(1))),
    "a forward called by its name": lambda m: setattr(m.inner, "forward", torch.sin),
    "a head of another class": lambda m: setattr(m, "head", nn.Identity()),
    "a head that is gone": lambda m: setattr(m, "head", None),
    "a convolution's padding": lambda m: setattr(
        m.stages[0][0],
        "_conv_forward",
        lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias),
    ),
    "a dropout's p": lambda m: setattr(m.drop, "p", 1.0),
}


def _pair() -> list[Any]:
    return [prepared(Reader()).train() for _ in range(2)]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_was_read_takes_effect(name: str) -> None:
    model, eager = _pair()
    convert(model)
    assert len(patterns(model)) == 2
    for m in (model, eager):
        CHANGES[name](m)
    x = images(2, 4, 5, 5)
    with pytest.warns(UserWarning, match="has changed since it was converted"):
        assert_same(results(model, x), results(eager, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert_same(results(model, x), results(eager, x))
        assert_same(results(convert(model), x), results(eager, x))


class Derived(Reader):
    """Calls its parent's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["a value", "a dictionary", "a parent's forward"])
def test_a_change_of_the_class_takes_effect(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = (prepared(Derived()) for _ in range(2))
    convert(model)
    if change == "a value":
        monkeypatch.setattr(Reader, "doubles", True)
    elif change == "a dictionary":
        monkeypatch.setitem(Reader.shared, "scale", 3.0)
    else:
        monkeypatch.setattr(Reader, "forward", lambda m, x: m.head(x))
    x = images(2, 4, 5, 5)
    with pytest.warns(UserWarning, match="has changed since it was converted"):
        assert_same(results(model, x), results(eager, x))


@pytest.mark.slow  # each is compiled twice
@pytest.mark.filterwarnings("ignore")  # in torch.compile's own code, and "has changed"
@pytest.mark.parametrize("name", [*CHANGES, "the class's value", "the class's dictionary"])
def test_a_change_is_seen_by_compiled_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes the comparison's answer for a constant: it has to see what changes."""
    model, eager = _pair()
    model.eval(), eager.eval()
    graphs, x = CompileCounter(), images(2, 4, 5, 5)
    compiled = torch.compile(convert(model), backend=graphs, fullgraph=True)
    for _ in range(2):
        assert_same(compiled(x), eager(x))
    assert graphs.frame_count == 1
    if name == "the class's value":
        monkeypatch.setattr(Reader, "doubles", True)
    elif name == "the class's dictionary":
        monkeypatch.setitem(Reader.shared, "scale", 3.0)
    else:
        CHANGES[name](model), CHANGES[name](eager)
    assert_same(compiled(x), eager(x))


def test_hooks_in_a_new_dictionary_run() -> None:
    """The forum's way to remove all hooks replaces the dictionary."""
    model = prepared(net(lambda m, x: m.relu(m.bn(m.conv(x)))))
    convert(model)
    model.bn._forward_hooks = OrderedDict()
    seen: list[Any] = []
    model.bn.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="BatchNorm2d"):
        model(images(2, 4, 5, 5))
    assert seen


@pytest.mark.parametrize("part", [slice(0, 2), slice(1, None), slice(None, None, -1)])
def test_lists_that_a_forward_makes(part: slice) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for stage in m.stages[part] + nn.ModuleList([]):
            x = stage(x)
        return x

    stages = nn.ModuleList([cbr(nn.ReLU()), cbr(nn.ReLU())])
    model, eager = (prepared(net(run, stages=copy.deepcopy(stages))) for _ in range(2))
    convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(model, images(2, 4, 5, 5)), results(eager, images(2, 4, 5, 5)))
    assert len(patterns(model)) == 1


class Refusing:
    """Compares itself with nothing, as an array in a list does."""

    def __eq__(self, other: object) -> bool:
        raise AttributeError

    __hash__ = object.__hash__


class Odd(nn.Module):
    """Holds what cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.value = cbr(nn.ReLU()), Refusing()

    def scaled(self, x: Tensor, scale: float) -> Tensor:
        return x * scale

    doubled = functools.partialmethod(scaled, scale=2.0)

    def forward(self, x: Tensor) -> Any:
        return self.doubled(self.body(x)) if self.value is not None else x


def test_what_cannot_be_compared_is_another_when_it_is_another() -> None:
    model, eager = (prepared(Odd()) for _ in range(2))
    convert(model)
    x = images(2, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(model, x), results(eager, x))
    model.value = Refusing()
    with pytest.warns(UserWarning, match=r"Odd\.value (was|has changed)"):
        assert_same(results(model, x), results(eager, x))


def test_a_scripted_child_may_be_asked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1)).double())

    def run(m: Any, x: Tensor) -> Any:
        return m.scripted(m.relu(m.bn(m.conv(x)))) * len(list(m.scripted.children()))

    model = prepared(net(run, scripted=scripted))
    assert patterns(convert(model)) == ["conv-bn-relu"]
    model(images(2, 4, 5, 5))


ALONE: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "a mode": (
        lambda: nn.Upsample(scale_factor=2, mode="nearest"),
        lambda m: setattr(m, "mode", "bicubic"),
    ),
    "an activation": (
        lambda: timm.layers.BatchNormAct2d(4),
        lambda m: setattr(m, "act", nn.SiLU()),
    ),
    "a slope": (
        lambda: timm.layers.BatchNormAct2d(4, act_layer=nn.LeakyReLU),
        lambda m: setattr(m.act, "negative_slope", 0.5),
    ),
    "a hook inside": (
        lambda: timm.layers.BatchNormAct2d(4),
        lambda m: m.act.register_forward_hook(lambda *found: found[-1] * 2),
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_layers_by_themselves_are_compared_too(name: str) -> None:
    make, change = ALONE[name]
    model, eager = prepared(make()), prepared(make())
    convert(model)
    assert isinstance(model, Converted)
    x = images(2, 4, 5, 5)
    assert_same(results(model, x), results(eager, x))
    for m in (model, eager):
        change(m)
    assert_same(results(model, x), results(eager, x))


class Registry(type):
    """Keeps a list of the classes that it has made."""

    made: ClassVar[list[str]] = []

    def __new__(cls, name: str, bases: Any, body: Any) -> Any:
        if name in cls.made:
            raise TypeError(f"{name} is there")
        cls.made.append(name)
        return super().__new__(cls, name, bases, body)


class Network(nn.Module, metaclass=Registry):
    """A body of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def test_classes_with_a_registry_of_their_own() -> None:
    model = convert(prepared(Network()))
    assert isinstance(model, Converted)
    assert isinstance(type(model), Registry)
    assert Registry.made == ["Network"]


def test_a_child_s_training_flag_is_read_at_each_call() -> None:
    model = prepared(net(lambda m, x: F.dropout(m.conv(x), 1.0, m.drop.training), drop=bn())).eval()
    convert(model)
    x = images(2, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(x).abs().sum() > 0
        model.drop.train()
        assert model(x).abs().sum() == 0


UNREAD: dict[str, Callable[[Any, Any], Any]] = {
    "a log": lambda m, y: m.logs.append(y.sum().item()),
    "a dictionary": lambda m, y: m.metrics.update(loss=y.sum().item() + len(m.logs)),
    "a counter": lambda m, y: setattr(m, "calls", m.calls + 1),
    "another metric": lambda m, y: setattr(m, "metric", nn.Linear(1, 1)),
    "an attribute of a layer": lambda m, y: setattr(m.conv, "flops", y.sum().item()),
    "a new head": lambda m, y: setattr(m, "head", nn.Conv2d(4, 4, 1).to(y.dtype)),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_a_forward_does_not_read_may_change(name: str) -> None:
    """As logs, meters and attention caches do, at each step."""
    model = prepared(net(lambda m, x: m.head(m.relu(m.bn(m.conv(x)))), head=nn.Conv2d(4, 4, 1)))
    model.logs, model.metrics, model.calls = [], {}, 0
    convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            UNREAD[name](model, model(images(2, 4, 5, 5)))
    assert patterns(model) == ["conv-bn-relu"]


def test_what_was_read_and_changes_at_each_step_warns_once() -> None:
    model = prepared(net(lambda m, x: m.relu(m.bn(m.conv(x))) * m.table.get("scale", 1)))
    model.table = {}
    convert(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            model.table[f"step {step}" * 99] = step
            model(images(2, 4, 5, 5))
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 400


def test_each_change_of_each_module_warns_at_the_line_of_the_call() -> None:
    """Two blocks of one class, and two attributes of one."""
    model: Any = prepared(nn.Sequential(Reader(), Reader())).eval()
    convert(model)
    x = images(2, 4, 5, 5)
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block, name in ((model[0], "half"), (model[1], "half"), (model[1], "type")):
            value = getattr(block, name)
            setattr(block, name, 2.0)
            for _ in range(2):
                model(x)
                lines.append(sys._getframe().f_lineno - 1)
            setattr(block, name, value)
    ours = [w for w in caught if "the model has changed" in str(w.message)]
    assert [(w.filename, w.lineno) for w in ours] == [(__file__, line) for line in lines[::2]]


def test_articles_are_those_of_speech() -> None:
    names = "Identity", "Upsample", "Conv2d", "UNet", "OneHot", "ELU"
    said = [one_of(type(name, (), {})) for name in names]
    assert said == ["an Identity", "an Upsample", "a Conv2d", "a UNet", "a OneHot", "an ELU"]


def test_a_forward_of_an_instance_s_own_is_traced_by_its_parent() -> None:
    """As YOLO's fuse() and timm's FasterNet set one."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), bn()
            self.forward: Any = self.plain

        def plain(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x)))

        def doubled(self, x: Tensor) -> Tensor:
            return 2 * self.plain(x)

    model, eager = (prepared(nn.Sequential(Block(), Block())) for _ in range(2))
    convert(model)
    x = images(2, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(model, x), results(eager, x))
    assert patterns(model) == ["conv-bn-relu > conv-bn-relu"]
    for m in (model, eager):
        block: Any = m[1]
        block.forward = block.doubled
    with pytest.warns(UserWarning, match=r"Block\.forward"):
        assert_same(results(model, x), results(eager, x))


def test_children_may_have_any_name() -> None:
    model, eager = (prepared(nn.Sequential(cbr(nn.ReLU()), cbr())) for _ in range(2))
    for m in (model, eager):
        m._modules = {"global": m[0], "is": m[1]}
    assert_same(results(convert(model), images(2, 4, 5, 5)), results(eager, images(2, 4, 5, 5)))
    assert patterns(model) == ["conv-bn-relu > conv-bn"]


def test_layers_of_a_traced_forward_keep_their_class() -> None:
    """Quantisation, FLOP counters and others ask `type(m) is nn.BatchNorm2d`."""
    layers = [nn.GroupNorm(2, 4), nn.Dropout(), nn.Upsample(scale_factor=2), nn.BatchNorm2d(4)]
    model = convert(prepared(nn.Sequential(cbr(nn.ReLU()), *layers)))
    x = images(2, 4, 5, 5)
    model(x)
    assert [type(m) for m in model[1:]] == [
        nn.GroupNorm, nn.Dropout, nn.Upsample, nn.BatchNorm2d,
    ]  # fmt: skip
    assert [type(m) for m in model[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert patterns(model) == ["conv-bn-relu", "group_norm", "dropout", "upsample", "batch_norm"]
    assert isinstance(convert(nn.BatchNorm2d(4)), Converted)  # who calls it itself?

"""What a parent's trace opens is traced by itself when something calls it alone."""

import copy
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import Branch, bn, cbr, net
from support.conversions import images, prepared
from support.tolerance import assert_same
from torch import nn

from fastcnn import convert, report
from fastcnn.convert import converted, fused_forward
from fastcnn.convert.converted import Converted, untraceable


def conversion(module: Any) -> Any:
    return module._fastcnn_conversion


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are traced from now on."""
    trace, found = fused_forward.trace, []

    def noted(module: nn.Module, *arguments: Any) -> Any:
        found.append(module)
        return trace(module, *arguments)

    monkeypatch.setattr(fused_forward, "trace", noted)
    return found


def test_a_part_is_traced_when_it_is_called() -> None:
    model = convert(nn.Sequential(cbr(nn.ReLU()), nn.Sequential(cbr(nn.ReLU()))))
    assert len(conversion(model).forwards) == 1
    assert [conversion(model[i]).forwards for i in (0, 1)] == [{}, {}]
    model(images(2, 4, 8, 8).float())
    assert conversion(model[1]).forwards == {}
    model[1](images(2, 4, 8, 8).float())
    assert [call.words for call in conversion(model[1]).forwards[0].patterns] == ["conv-bn-relu"]


@pytest.mark.parametrize("fuses", [True, False])
def test_a_sequential_that_a_forward_goes_through_is_part_of_its_trace(
    fuses: bool, traced: list[nn.Module]
) -> None:
    blocks = [cbr(nn.ReLU()) if fuses else nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(3)]
    model = net(
        lambda m, x: m.blocks[2](m.blocks[1](m.blocks[0](x))), blocks=nn.Sequential(*blocks)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(model)
    assert traced == [model]
    assert isinstance(model.blocks, Converted) is fuses
    x = images(2, 4, 8, 8).float()
    assert_same(model.blocks(x).double(), model(x).double())
    assert traced == [model, *[model.blocks] * fuses]


class Caching(nn.Sequential):
    """Changes itself at each call, as attention that caches its biases."""

    def forward(self, x: torch.Tensor) -> Any:
        self.cached = x.shape
        return super().forward(x)


def test_only_what_changes_itself_is_left_out_of_a_trace(traced: list[nn.Module]) -> None:
    blocks = [nn.Sequential(cbr(nn.ReLU()), Caching(cbr(nn.ReLU()))) for _ in range(3)]
    model = nn.Sequential(*blocks)
    convert(model)
    changing = [block[1] for block in blocks]
    below = [m for block in changing for m in (block, *block.children())]
    assert traced == [model, *below, model]
    assert all("changes the attribute Caching.cached" in untraceable[m] for m in changing)
    assert [call.words for call in conversion(model).forwards[0].patterns] == ["conv-bn-relu"] * 3


def test_what_inference_would_fuse_is_found_in_the_same_trace(traced: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    with pytest.warns(UserWarning, match='for inference mode="infer" fuses its convolutions'):
        convert(model)
    assert 'mode="infer"' in str(report(model))
    assert traced == [model] * 2  # convert's, and report's of a model that is not converted


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [("0.1", "momentum", None), ("0.1", "eps", 0.5), ("1", "p", 0.75), ("0.0", "calls", 1)],
)
def test_what_convert_asks_of_layers_is_no_read(layer: str, name: str, value: Any) -> None:
    """A copy is traced when it is called, and its layers are classified meanwhile."""
    model = prepared(nn.Sequential(cbr(nn.ReLU()), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))).train()
    model[0][0].calls = 0
    copied: Any = copy.deepcopy(convert(model))
    x = images(2, 4, 8, 8)
    copied(x)
    setattr(copied.get_submodule(layer), name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied(x)
    assert conversion(copied).holds()


@pytest.mark.filterwarnings("ignore")  # in torch.compile's own code
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_few_of_many_sets_of_training_flags_are_kept(mode: Any) -> None:
    """As a random freeze of layers makes them: those called last stay, and all others come back."""
    drops = {f"drop{i}": nn.Dropout(1.0) for i in range(4)}

    def run(m: Any, x: torch.Tensor) -> list[torch.Tensor]:
        y = m.relu(m.bn(m.conv(x)))
        return [y, *(F.dropout(y, 1.0, getattr(m, name).training) for name in drops)]

    model: Any = prepared(net(run, **drops)).eval()
    eager = copy.deepcopy(model)
    compiled, x = torch.compile(convert(model, mode=mode), backend="eager"), images(2, 4, 5, 5)
    flags = [[bool(i >> bit & 1) for bit in range(4)] for i in range(16)]
    kept: list[Any] = []
    with torch.no_grad():
        for i in [*range(16), 15, 14, 0, 14, 3]:
            for m in (model, eager):
                for name, flag in zip(drops, flags[i], strict=True):
                    getattr(m, name).training = flag
            assert_same(model(x), eager(x))
            assert len(conversion(model).forwards) <= converted.MOST_FORWARDS
            kept.append(conversion(model).current())
            if i in (0, 15, 3):
                assert_same(compiled(x), eager(x))
    assert kept[16] is kept[15]
    assert kept[17] is kept[19] is kept[14]
    assert kept[18] is not kept[0]


def test_a_forward_that_another_thread_has_dropped_runs_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = prepared(nn.Sequential(cbr(nn.ReLU()))).eval(), images(2, 4, 5, 5)
    expected = model(x)
    convert(model)
    monkeypatch.setattr(converted.Conversion, "_find", lambda *_: converted.MOST_FORWARDS)
    assert torch.equal(model(x), expected)
    assert conversion(model).current() is None


def test_other_threads_run_models_of_pytorch_meanwhile() -> None:
    plain, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50))), torch.randn(1, 4)
    errors: list[BaseException] = []
    ends = threading.Event()

    def serve() -> None:
        try:
            while not ends.is_set():
                plain(x)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        convert(nn.Sequential(cbr(nn.ReLU()), Branch(body=cbr(nn.ReLU()))))
    ends.set()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_a_forward_of_the_instance_is_called(kind: Any) -> None:
    # As YOLO's fuse() and accelerate's hooks set one: its class does not know what it does.
    inner = kind([cbr(nn.ReLU())]) if kind is nn.ModuleList else kind(cbr(nn.ReLU()))
    model = prepared(nn.Sequential(cbr(nn.ReLU()), inner)).eval()
    inner.forward = lambda x: 2 * inner[0](x)
    x = images(2, 4, 8, 8)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(convert(model)(x), before)
    assert isinstance(model, Converted)
    assert conversion(model).holds()
    assert isinstance(inner[0], Converted)


def test_a_shared_part_that_does_not_trace() -> None:
    class Around(nn.Module):
        def __init__(self, bad: nn.Module) -> None:
            super().__init__()
            self.body, self.bad = cbr(nn.ReLU()), bad

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bad(self.body(x))

    bad = Branch(body=cbr(nn.ReLU()))
    model = convert(nn.Sequential(Around(bad), Around(bad)))
    for part in model:
        part(images(2, 4, 8, 8).float())
        assert len(conversion(part).forwards[0].patterns) == 1


def test_a_first_call_from_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = copy.deepcopy(convert(prepared(cbr(nn.ReLU()))))
    trace, traced = converted.trace_and_fuse, []
    entered, both = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        traced.append(None)
        entered.set()
        both.wait()
        second.join(0.2)  # which waits for this trace, or meets classes that are not its own
        return trace(*arguments)

    monkeypatch.setattr(converted, "trace_and_fuse", slow)
    first, second = (threading.Thread(target=conversion(model).current) for _ in range(2))
    first.start()
    entered.wait()
    second.start()
    both.set()
    first.join()
    second.join()
    assert len(traced) == len(conversion(model).forwards) == 1
    assert not conversion(model)._without


@pytest.mark.parametrize("make", [lambda: cbr(nn.ReLU()), bn])
def test_an_error_keeps_no_tensors(make: Any) -> None:
    model = convert(make())
    x = torch.randn(2, 7, 8, 8)
    gone = weakref.ref(x)
    with pytest.raises(ValueError, match="channels"):
        model(x)
    del x
    assert gone() is None  # without garbage collection


def test_a_layer_that_is_named_as_an_error_begins() -> None:
    model = convert(net(lambda m, x: m.relu(m.bn(m.conv(x)))))
    with pytest.raises(ValueError, match=r"^conv: input: expected 4 channels, got 7"):
        model(torch.randn(2, 7, 8, 8))

"""fastcnn.report(model): what people read about a conversion."""

import copy
import random
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversion_cases import Branch, cbr, conv, net
from support.oracles import torchvision_resnet
from support.paths import ROOT
from torch import Tensor, nn

import fastcnn
from fastcnn import _C, convert, report
from fastcnn.convert.report import rows
from fastcnn.convert.rows import ConversionRow, left, table

CONV, CPP = "oneDNN through PyTorch + C++", "C++"

RESNET = """
ResNet: 5 of 5 places run fused, by oneDNN through PyTorch + C++
mode="train", memory="auto" (full), float32, NCHW, cpu, in training
faster still:
  model.to(memory_format=torch.channels_last), and the images alike
      convolutions run in channels_last: from NCHW each copies its input and its output

fused                           as one call
conv1 .. maxpool                conv-bn-relu-pool
layer1.0: conv1 .. relu         conv-bn-relu > conv-bn + identity - relu
layer2.0: downsample.0 .. relu  conv-bn-relu > conv-bn + projection - relu
layer3.0: downsample.0 .. relu  conv-bn-relu > conv-bn + projection - relu
layer4.0: downsample.0 .. relu  conv-bn-relu > conv-bn + projection - relu
"""
DETAIL = """
layer1.0: conv1 .. relu         conv-bn-relu > conv-bn +    yes    oneDNN through PyTorch + C++
                                  identity - relu
"""


@pytest.fixture(autouse=True)
def _no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed does not hang on the processor."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def of(model: nn.Module) -> list[ConversionRow]:
    return rows(convert(model))


def test_a_resnet(capsys: pytest.CaptureFixture[str]) -> None:
    model = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1])
    found = report(convert(model))
    assert capsys.readouterr().out.strip() == RESNET.strip()
    report(model, verbose=True)
    assert DETAIL in capsys.readouterr().out
    assert found[1] == ConversionRow(
        "layer1.0: conv1 .. relu", "conv-bn-relu > conv-bn + identity - relu", True, CONV, ""
    )
    assert left(found) == []


def test_an_unconverted_model_stays_so() -> None:
    model = nn.Sequential(cbr(nn.ReLU()), nn.Dropout())
    classes = [type(m) for m in model.modules()]
    assert rows(model) == [
        ConversionRow("0: 0 .. 2", "conv-bn-relu", False, "PyTorch", "not converted"),
        ConversionRow("1", "dropout", False, "PyTorch", "not converted"),
    ]
    assert [type(m) for m in model.modules()] == classes
    assert left(rows(model)) == rows(model)


def test_nothing_convertible_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(nn.Linear(2, 2)) == []
    out = capsys.readouterr().out
    assert out == "Linear: nothing in it is convertible\nfloat32, cpu, in training\n"


def hints(model: nn.Module) -> list[str]:
    return [hint.code for hint in report(model).summary.hints]  # type: ignore[attr-defined]


LAST = "model.to(memory_format=torch.channels_last), and the images alike"
INFER, NO_GRAD = 'fastcnn.convert(model, mode="infer")', "with torch.no_grad()"
HALF = 'with torch.autocast("cpu", torch.bfloat16)'


def test_what_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(cbr(nn.ReLU()))
    assert hints(model) == ["fastcnn.convert(model)", LAST]
    convert(model)
    assert hints(model) == [LAST]
    model.to(memory_format=torch.channels_last)
    assert hints(model) == []
    assert hints(model.eval()) == [INFER, NO_GRAD]
    convert(model, "infer")
    assert hints(model) == [NO_GRAD]
    with torch.no_grad():
        assert hints(model) == []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(_C, "has_fast_bf16", lambda: True)
    assert hints(model.train()) == [HALF]
    assert hints(model.bfloat16()) == []
    monkeypatch.setattr(_C, "has_fast_bf16", lambda: False)  # it is no faster than float32
    assert hints(model.float()) == []


def test_convolutions_without_a_norm_are_fused_in_inference() -> None:
    model = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Dropout())
    assert hints(model) == ["fastcnn.convert(model)", INFER, LAST]
    convert(model)
    assert hints(model) == [INFER, LAST]
    patches = nn.Sequential(conv(4, 4), nn.LayerNorm(8), conv(4, 4), nn.Dropout())  # no activation
    assert hints(patches) == ["fastcnn.convert(model)", LAST]


def test_depthwise_convolutions_are_fused_in_training() -> None:
    same = nn.Conv2d(4, 4, 2, padding="same", groups=4)
    model = nn.Sequential(conv(4, 4, groups=4), nn.GELU(), same)
    why = "2 has padding='same' with an even kernel, which pads one side more"
    assert of(model) == [
        ConversionRow("0 .. 1", "depthwise_conv2d-gelu", True, CPP, ""),
        ConversionRow("2", "depthwise_conv2d", False, "PyTorch", why),
    ]
    assert hints(model) == []  # mode="infer" would gain nothing
    model = convert(nn.Sequential(conv(4, 4, groups=4), nn.GELU()))
    model(torch.ones(4, 8, 8))
    (row,) = rows(model)
    assert row.reason.startswith("its last call that was not fused: its input has 3 dimensions")


def test_depthwise_convolutions_are_pytorchs_where_they_are_as_fast() -> None:
    model = convert(nn.Sequential(conv(16, 16, groups=16)))
    wide = convert(nn.Sequential(nn.Conv2d(16, 16, 7, padding=3, groups=16)))
    x = torch.ones(1, 16, 8, 8).to(memory_format=torch.channels_last)
    why = "its last call that was not fused: PyTorch's kernel is as fast there"

    def reasons() -> list[str]:
        return [row.reason for m in (model, wide) for row in rows(m)]

    model(x), wide(x)  # with gradients
    assert reasons() == ["", ""]
    with torch.no_grad():
        model(x.contiguous()), wide(x)
        assert reasons() == ["", ""]
        model(x), wide(x)
    assert reasons() == [why, ""]


def test_a_depthwise_convolution_of_a_computed_weight_is_computed_once() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.ReLU(), conv(16, 2))
    torch.nn.utils.parametrizations.spectral_norm(model[0])
    plain, x = copy.deepcopy(model), torch.ones(1, 16, 8, 8)
    model.append(nn.BatchNorm2d(2)), plain.append(nn.BatchNorm2d(2))
    convert(model)
    model(x), plain(x)  # a step of the power iteration
    for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert [row.reason for row in left(rows(model))] == ["0 has a parametrization"]


def test_depthwise_convolutions_by_themselves_are_fused_on_the_cpu_alone() -> None:
    model = convert(nn.Sequential(conv(4, 4, groups=4)))
    (row,) = rows(model.to("meta"))
    assert row.backend == "PyTorch"
    model = nn.Sequential(Branch(conv=conv(4, 4, groups=4)))  # called by what does not trace
    assert [row.pattern for row in of(model) if row.fused] == ["depthwise_conv2d"]
    assert not model[0].conv(torch.ones(1, 4, 8, 8)).isnan().any()


def test_what_does_nothing_is_no_place() -> None:
    model = nn.Sequential(cbr(nn.ReLU()), nn.Dropout(0.0), nn.LayerNorm(8))
    norm = "fastcnn has no kernel for a LayerNorm over the last dimension"
    assert of(model) == [
        ConversionRow("0: 0 .. 2", "conv-bn-relu", True, CONV, ""),
        ConversionRow("2", "layer_norm", False, "PyTorch", norm),
    ]
    assert left(rows(model)) == []  # strict=True takes it
    model[1].p = 0.5  # and one that drops is one
    with pytest.warns(UserWarning, match=r"Dropout\.p was 0\.0 and is 0\.5 now"):
        model(torch.ones(2, 4, 8, 8))
    assert "dropout" in [row.pattern for row in of(model)]


def test_others_are_one_line_for_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    report(convert(nn.Sequential(cbr(nn.ReLU()), *(nn.LayerNorm(8) for _ in range(9)))))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "not fused",
        "layer_norm (9 places, the first 1): fastcnn has no kernel for a LayerNorm over the last "
        "dimension",
    ]


class Notebook:
    """What IPython shows, and which cell runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        self.execution_count = 1
        shell = type("ZMQInteractiveShell", (), {"execution_count": property(lambda _: self.now())})
        package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        package.get_ipython = shell  # type: ignore[attr-defined]
        display.HTML = str  # type: ignore[attr-defined]
        display.display = self.shown.append  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def now(self) -> int:
        return self.execution_count


def test_a_notebook_shows_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = Notebook(monkeypatch)
    found: Any = report(convert(nn.Sequential(cbr(nn.ReLU()), nn.LayerNorm(8))))
    found._ipython_display_()  # the value of the cell, which has shown it
    (html,) = notebook.shown
    assert capsys.readouterr().out == ""
    assert "<td>0: 0 .. 2</td><td>conv-bn-relu</td><td>yes</td>" in html
    assert "1 of 1 place runs fused, by oneDNN" in html
    notebook.execution_count = 2
    found._ipython_display_()
    assert notebook.shown == [html, html]


def test_a_console_shows_no_rows_of_the_value() -> None:
    found = report(convert(nn.Sequential(cbr(nn.ReLU()))))
    assert repr(found) == f"<Report: Sequential: 1 of 1 place runs fused, by {CONV}>"


def test_layers_without_a_kernel() -> None:
    model = nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic"), nn.GroupNorm(2, 4))
    assert of(model) == [
        ConversionRow("1", "group_norm", True, CPP, ""),
        ConversionRow("0", "upsample", False, "PyTorch", "there is no kernel for mode='bicubic'"),
    ]


def test_what_is_left_of_a_graph_has_its_reason() -> None:
    same = nn.Sequential(nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4), nn.ReLU())
    why = "0.0 has padding='same' with an even kernel, which pads one side more"
    assert of(nn.Sequential(same)) == [
        ConversionRow("0: 1 .. 2", "batch_norm-relu", True, CPP, ""),
        ConversionRow("0.0", "conv", False, "PyTorch", why),
    ]


def test_what_does_not_trace_has_a_row_and_its_children_theirs() -> None:
    model = nn.Sequential(Branch(conv=conv(), norm=nn.BatchNorm2d(4)), Branch(body=cbr()))
    first, norm, second, body = of(model)
    assert first[:4] == ("0", "conv, batch_norm", False, "PyTorch")
    assert first.reason.startswith("its forward does not trace: TraceError: symbolically traced")
    assert norm == ConversionRow("0.norm", "batch_norm", True, CPP, "")
    assert second[:4] == ("1", "", False, "PyTorch")  # nothing of its own is known
    assert body == ConversionRow("1.body: 0 .. 1", "conv-bn", True, CONV, "")
    assert left([first, norm, second, body]) == [first]


def _own() -> Tensor:
    return torch.ones(4, 1, 1)  # of its own


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # of Counts
        self.calls = 1
        return x.relu()


class Anything(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:  # of Anything
        return x[0]


LINES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a child's branch": (lambda: nn.Sequential(Branch(body=cbr())), "if x"),
    "a function": (lambda: net(lambda m, x: m.conv(x) * _own()), "# of its own"),
    "the standard library": (
        lambda: net(lambda m, x: m.conv(copy.deepcopy(x).sin()) + random.choice(x)),  # of Python
        "# of Python",
    ),
    "what a call changes": (Counts, "# of Counts"),
    "its arguments": (Anything, "# of Anything"),
}


@pytest.mark.parametrize("where", ["in the working directory", "elsewhere"])
@pytest.mark.filterwarnings("ignore:fastcnn.convert. nothing in")
@pytest.mark.parametrize("name", LINES)
def test_what_does_not_trace_names_the_line(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, text = LINES[name]
    monkeypatch.chdir(ROOT if where == "in the working directory" else tmp_path)
    reason = of(make())[0].reason
    file, line = reason.removesuffix(")").rpartition("(")[2].split(":")
    found = next(path for root in ("", *sys.path) if (path := Path(root, file)).is_file())
    assert text in found.read_text().splitlines()[int(line) - 1], reason


def test_functions_are_named_within_their_module() -> None:
    resize = net(lambda m, x: nn.functional.interpolate(x, scale_factor=2))
    assert [row.module for row in of(nn.Sequential(resize))] == ["0.interpolate"]


def test_calls_that_ran_unfused_are_shown() -> None:
    model = convert(nn.Sequential(cbr(nn.ReLU()), Branch(norm=nn.BatchNorm2d(4))))
    x = torch.randn(2, 4, 6, 12)[..., ::2]
    model[0](x)
    model[1].norm(x)
    chain, branch, norm = rows(model)
    why = "its last call that was not fused: its input is not dense: strides (288, 72, 12, 2)"
    assert chain.fused
    assert chain.reason.startswith(why)
    assert not branch.fused
    assert norm.fused
    assert norm.reason.startswith(why)


def test_a_later_change_is_shown_and_still_warned_of() -> None:
    model = convert(nn.Sequential(cbr(nn.ReLU()), nn.Dropout()))
    model[0][0].kernel_size = [3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rows(model)
    whys = [(row.module, row.pattern, row.reason) for row in found]
    changed = "changed since it was converted: Conv2d.kernel_size was (3, 3) and is [3, 3] now"
    assert whys == [
        ("Sequential", "dropout", changed),
        ("0: 0 .. 2", "conv-bn-relu", ""),  # traced when it is called, as it is by then
        ("1", "dropout", "its forward runs as written"),
    ]
    with pytest.warns(UserWarning, match="has changed since it was converted"):
        model(torch.randn(2, 4, 6, 6))


def test_a_device_without_kernels() -> None:
    class Elsewhere(nn.Sequential):
        pass

    with torch.device("meta"):
        model = Elsewhere(cbr(nn.ReLU()))
    (row,) = of(model)
    assert row == ConversionRow(
        "0: 0 .. 2", "conv-bn-relu", False, "PyTorch", "this build has no kernels for meta"
    )


def test_long_names_break_at_their_dots() -> None:
    name = "encoder.stages.3.blocks.12.attention.output.projection.norm"
    lines = list(table([ConversionRow(name, "batch_norm", False, "PyTorch", "because " * 30)]))
    assert max(map(len, lines)) <= 100
    assert "encoder.stages.3.blocks.12." in lines[1].split()


def test_without_a_model_it_is_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    fastcnn.plan._planner.cache_clear()
    assert report() == []
    assert "nothing was planned" in capsys.readouterr().out


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"report: model: expected a torch\.nn\.Module, got int"):
        report(3)  # type: ignore[arg-type]

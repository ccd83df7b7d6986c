"""convert and revert: what a user may get wrong, and where they are called."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.conversion_cases import bn, cbr, conv, net
from support.conversions import images, patterns, prepared, results
from support.tolerance import assert_same
from torch import nn

from fastcnn import convert, report, revert, verify
from fastcnn.convert import api
from fastcnn.convert.codegen import fit
from fastcnn.convert.converted import Converted


@pytest.mark.parametrize("model", [None, cbr, "resnet50", torch.relu])
@pytest.mark.parametrize("call", [convert, revert])
def test_no_model(call: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got "):
        call(model)


def test_a_class_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"got the class ReLU: make a model .*, ReLU\(\.\.\.\)$"):
        convert(nn.ReLU)


@pytest.mark.parametrize("call", [convert, report, lambda m: verify(m, images(2, 4, 8, 8))])
def test_layers_that_have_no_sizes_yet(call: Callable[[Any], Any]) -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    model = nn.Sequential(cbr(), lazy)
    words = r"expected parameters .* sizes, got a LazyConv2d \(1\.0\) whose .* with a batch first"
    with pytest.raises(ValueError, match=words):
        call(model)
    assert not any(isinstance(m, Converted) for m in revert(model).modules())
    model(images(2, 4, 8, 8).float())
    assert patterns(convert(model)) == ["conv-bn > conv-bn-relu"]
    with pytest.raises(ValueError, match=r"got a LazyConv2d whose"):
        call(nn.LazyConv2d(4, 3))


def test_a_backend_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "HAS_CUDA", False)
    with pytest.raises(
        ValueError,
        match=r"backend: expected 'auto' or 'cpu', .* without CUDA, got 'cuda'; rebuild it where "
        r"nvcc is, with FASTCNN_CUDA=ON",
    ):
        convert(cbr(), backend="cuda")


def test_a_second_derivative_says_where(recwarn: pytest.WarningsRecorder) -> None:
    model, x = convert(prepared(cbr(nn.ReLU()))), images(2, 4, 5, 5).requires_grad_()

    def penalty() -> None:
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()

    words = r"^conv_bn_act with an output of \[2, 4, 5, 5\]: expected to be differentiated once"
    with pytest.raises(RuntimeError, match=words):
        penalty()
    recwarn.clear()
    with pytest.raises(RuntimeError, match=words), torch.autograd.detect_anomaly(check_nan=False):
        penalty()  # what the message says shows the call
    assert any("model(x).square()" in str(warned.message) for warned in recwarn)
    revert(model)
    penalty()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "eval"}, "mode: expected one of train, infer, got 'eval'"),
        ({"backend": "triton"}, "backend: expected one of auto, cpu, cuda, got 'triton'"),
        (
            {"memory": "none"},
            "memory: expected one of auto, full, default, low, lowest, got 'none'",
        ),
        # verify's second argument is x.
        ({"mode": torch.ones(2, 4, 8, 8)}, "mode: expected one of train, infer, got a Tensor$"),
        (
            {"memory": ["low"]},
            "memory: expected one of auto, full, default, low, lowest, got a list$",
        ),
    ],
)
def test_unknown_words(options: dict[str, Any], words: str) -> None:
    model = cbr()
    with pytest.raises(ValueError, match=words):
        convert(model, **options)
    assert not isinstance(model, Converted)


@pytest.mark.parametrize("flag", ["yes", 1, None, torch.ones(2, 4, 8, 8)])
def test_flags_are_true_or_false(flag: Any) -> None:
    kind = type(flag).__name__
    with pytest.raises(TypeError, match=f"^convert: strict: expected True or False, got {kind}$"):
        convert(cbr(), strict=flag)
    with pytest.raises(TypeError, match=f"^report: verbose: expected True or False, got {kind}$"):
        report(cbr(), flag)


def test_strict_raises_with_what_is_left_and_changes_nothing() -> None:
    model = nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU()))
    assert convert(model, strict=True) is model
    model[1][0].register_forward_hook(lambda *_: None)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=r"strict=True(.*\n)*1\.0 +conv(.*\n)* +1\.0 has forward hooks"
    ):
        convert(model, strict=True)
    assert [type(m) for m in model.modules()] == classes
    branches = nn.Sequential(net(lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else x))
    with pytest.raises(ValueError, match=r"0 +conv, batch_norm +no(.*\n)*.*does not trace"):
        convert(branches, strict=True)
    assert not any(isinstance(m, Converted) for m in branches.modules())


def test_twice_is_once() -> None:
    model = convert(cbr(nn.ReLU()))
    classes = [type(m) for m in model.modules()]
    convert(model)
    assert [type(m) for m in model.modules()] == classes
    convert(model, memory="lowest")  # other options are another conversion
    assert [type(m) for m in model.modules()] != classes
    assert patterns(model) == ["conv-bn-relu"]


def test_again_after_something_came_in() -> None:
    model = convert(nn.Sequential(cbr(nn.ReLU()), nn.Tanh()))
    model[1] = cbr(nn.Sigmoid())
    convert(model)
    assert patterns(model) == ["conv-bn-relu > conv-bn-sigmoid"]


def test_a_part_that_was_converted_before() -> None:
    part = convert(cbr(nn.ReLU()), memory="lowest")
    model = convert(nn.Sequential(part, cbr()))
    assert patterns(model) == ["conv-bn-relu > conv-bn"]
    assert model[0]._fastcnn_conversion.options.memory == "auto"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_within_no_grad(context: Any) -> None:
    """Nothing of the mode that it was converted in stays."""
    x = images(2, 4, 5, 5)
    model, eager = prepared(cbr(nn.ReLU())), prepared(cbr(nn.ReLU()))
    with context():
        convert(model)
        assert_same(model(x), eager(x))
    assert patterns(model) == ["conv-bn-relu"]
    assert_same(results(model, x), results(eager, x))


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = convert(net(lambda m, x: m.relu(m.bn(m.conv(x)) + x)))
        y = model(torch.empty(2, 4, 8, 8))
    assert patterns(model) == ["conv-bn + identity - relu"]
    assert y.shape == (2, 4, 8, 8)
    assert y.is_meta
    model.to_empty(device="cpu")
    assert prepared(model)(images(2, 4, 5, 5)).isfinite().all()


def test_models_without_anything_to_convert() -> None:
    for model in (nn.Linear(3, 3), nn.Sequential(), nn.ModuleList([nn.ReLU()]), nn.Identity()):
        with pytest.warns(UserWarning, match=r"nothing in \w+ runs fused: it holds nothing that"):
            assert convert(model) is model
        assert not isinstance(model, Converted)
        convert(model)  # says so once


def test_convolutions_without_a_norm_are_told_of_inference() -> None:
    model = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4), nn.ReLU())
    with pytest.warns(
        UserWarning, match=r'Sequential runs fused: for inference mode="infer" fuses'
    ):
        convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, "infer")


def test_a_layer_by_itself() -> None:
    x = images(2, 4, 5, 5)
    for layer in (bn(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)):
        eager = prepared(type(layer)(*((2, 4) if isinstance(layer, nn.GroupNorm) else (4,))))
        convert(prepared(layer))
        assert isinstance(layer, Converted)
        assert_same(results(layer, x), results(eager, x))


def test_inputs_without_a_kernel_run_as_before() -> None:
    """Strided views, three dimensions: what PyTorch takes keeps working."""
    model = prepared(nn.Sequential(conv(), nn.GroupNorm(2, 4), nn.ReLU(), conv(), bn(), nn.ReLU()))
    eager = prepared(nn.Sequential(conv(), nn.GroupNorm(2, 4), nn.ReLU(), conv(), bn(), nn.ReLU()))
    convert(model)
    wide = images(2, 8, 5, 5)[:, ::2]
    assert_same(results(model, wide), results(eager, wide))
    one = convert(prepared(nn.GroupNorm(2, 4)))
    assert one(images(2, 4, 7)).shape == (2, 4, 7)
    with pytest.raises(RuntimeError, match="channels"):  # PyTorch's own words
        model(images(2, 3, 5, 5)[:, :, ::2])


def test_functions_without_a_kernel_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_said", set())
    model = convert(net(lambda m, x: nn.functional.interpolate(x, scale_factor=2.0)))
    wide = images(2, 8, 5, 5)[:, ::2]
    with pytest.warns(UserWarning, match=r"an interpolate or a dropout .* its input is not dense"):
        y = model(wide)
    assert torch.equal(y, nn.functional.interpolate(wide, scale_factor=2.0))
    model(wide)


def test_an_explicit_backend_does_not_fall_back() -> None:
    model = convert(prepared(cbr(nn.ReLU())), backend="cpu")
    with pytest.raises(
        ValueError,
        match=r"backend='cpu': expected an input for its kernels, but .*"
        r"not dense",
    ):
        model(images(2, 8, 5, 5)[:, ::2])


@pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is deprecated")
def test_scripted_models_are_refused() -> None:
    scripted = torch.jit.script(nn.ReLU())
    traced = torch.jit.trace(nn.ReLU(), images(2, 4, 5, 5))
    for call in (convert, report, lambda model: verify(model, images(2, 4, 5, 5))):
        for model in (scripted, traced):
            with pytest.raises(
                TypeError,
                match=rf"model: expected a torch\.nn\.Module, got {type(model).__name__}, whose "
                r"forward torch\.jit has compiled, .*: pass the model that it was made of",
            ):
                call(model)
    assert revert(scripted) is scripted


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (np.zeros((2, 4, 5, 5)), r"numpy\.ndarray; torch\.from_numpy\(array\) makes one"),
        ([np.zeros(3)], "list"),
        ((np.zeros(3), 3), r"numpy\.ndarray, int; torch\.from_numpy"),
        ({"x": 3}, "dict"),
        ("x", "str"),
        (None, "NoneType"),
        ((), "none"),
    ],
)
def test_verify_says_what_it_takes(x: Any, got: str) -> None:
    words = r"^verify: x: expected a Tensor, or a tuple of the model's inputs with .*, got " + got
    with pytest.raises(TypeError, match=words):
        verify(convert(cbr()), x)


def test_attributes_that_answer_with_errors_of_their_own() -> None:
    class Strict(nn.Sequential):
        def __getattr__(self, name: str) -> Any:
            if name in ("parametrizations", "_fastcnn_conversion"):
                raise KeyError(name)
            return super().__getattr__(name)

    assert patterns(convert(Strict(conv(), bn(), nn.ReLU()))) == ["conv-bn-relu"]

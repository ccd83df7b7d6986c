"""Linear layers with activations in foreign forwards: found, fused where it pays, left alone."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import Forward
from support.conversions import assert_converts, assert_infers, images, patterns
from support.linear_act_cases import RULES, Types, answer
from support.oracles import timm, torchvision
from support.roundings import Expected
from torch import Tensor, nn

import fastcnn
from fastcnn import convert
from fastcnn.convert.codegen import fit
from fastcnn.ops.linear_act import folded, interface


def net(run: Callable[..., Any], **more: nn.Module) -> Forward:
    layers = {"fc1": nn.Linear(6, 24), "fc2": nn.Linear(24, 6), "act": nn.GELU()}
    return Forward(run, **{**layers, **more})


def mlp(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), *more, nn.Linear(24, 6))


# A model of [2, 5, 6], and what is one call of it.
CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "an MLP": (mlp, ["linear-gelu > linear"]),
    "torchvision's": (
        lambda: nn.Sequential(
            torchvision.models.vision_transformer.MLPBlock(6, 24, 0.0),
        ),
        ["linear-gelu > linear"],
    ),
    "timm's": (lambda: nn.Sequential(timm.layers.Mlp(6, 24)), ["linear-gelu > linear"]),
    "functions": (
        lambda: net(lambda m, x: F.relu(m.fc2(torch.sigmoid(m.fc1(x))))),
        ["linear-sigmoid > linear-relu"],
    ),
    "without a bias, and three": (
        lambda: nn.Sequential(
            nn.Linear(6, 9, bias=False), nn.Linear(9, 8), nn.SiLU(), nn.Linear(8, 4), nn.ReLU6()
        ),
        ["linear > linear-silu > linear-relu6"],
    ),
    "a dropout between": (lambda: mlp(nn.Dropout(0.0)), ["linear-gelu > linear"]),
    "an activation that has no kernel": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU("tanh"), nn.Linear(9, 8), nn.ReLU()),
        ["linear-relu"],
    ),
    "a hidden value that is read again": (
        lambda: net(lambda m, x: (lambda h: m.fc2(h) + h.sum())(m.act(m.fc1(x)))),
        ["linear-gelu"],
    ),
    "one layer twice": (
        lambda: net(lambda m, x: m.fc2(m.act(m.fc1(m.fc2(m.act(m.fc1(x))))))),
        ["linear-gelu > linear > linear-gelu > linear"],
    ),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "without an activation": lambda: nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)),
    "the sum before the activation": lambda: net(lambda m, x: m.fc2(m.act(m.fc1(x) + 1))),
    "z is read again": lambda: net(lambda m, x: (lambda z: m.fc2(m.act(z) + z))(m.fc1(x))),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ask both answers of the rule, and oneDNN for small layers."""
    answer(request.param, monkeypatch)
    monkeypatch.setattr(folded, "_FEW", 0)
    return str(request.param)


@pytest.mark.parametrize("name", CASES)
def test_found(name: str) -> None:
    make, expected = CASES[name]
    assert assert_converts(make(), images(2, 5, 6)) == expected


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("name", CASES)
def test_inference(name: str) -> None:
    make, expected = CASES[name]
    assert assert_infers(make(), images(2, 3, 5, 6)) == expected


@pytest.mark.filterwarnings("ignore:fastcnn.convert. nothing in")
@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str) -> None:
    model = OTHERS[name]()
    assert assert_converts(model, images(2, 5, 6)) == []
    assert not fastcnn.report(model)  # and no row says so


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_types(rule: str, autocast: bool, mode: Any) -> None:
    torch.manual_seed(0)
    model = mlp().requires_grad_(mode == "train")
    exact, x = copy.deepcopy(model).double(), torch.randn(4, 5, 6)
    if not autocast:
        model.bfloat16()
        exact.load_state_dict(model.state_dict())
        x = x.bfloat16()
    plain = copy.deepcopy(model)
    convert(model, mode=mode)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Types() as types:
        y = model(x)
        if mode == "train":
            y.float().square().sum().backward()
    fused = rule == "in float32"
    if fused or mode == "train":
        assert set(types.read) == {torch.float32 if fused else torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = plain(x)
    assert y.dtype is expected.dtype
    state = torch.float32 if autocast else torch.bfloat16
    limits = Expected(lambda: {"y": exact(x.double())}, torch.bfloat16, state, autocast=True)
    limits.check({"y": y.detach()})
    if mode == "train":
        note = fit.notes.get(model[2])
        assert note == (None if fused else "PyTorch's kernel is as fast there")


class Attention(nn.Module):
    """Linear layers by themselves, behind a layer that is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.qkv, self.proj = *mlp()[:2], nn.Linear(24, 72), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.act(self.fc1(x)).tanh()).chunk(3, -1)
        y: Tensor = self.proj(F.softmax(q * k, -1) * v)
        return y


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_half_types_of_linear_layers_by_themselves(rule: str, mode: Any) -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 5, 6)
    plain = copy.deepcopy(model)
    convert(model, mode=mode)
    assert patterns(model) == ["linear-gelu"]  # and none says more
    assert torch.equal(model(x), plain(x))  # float32 is PyTorch's
    with torch.autocast("cpu", torch.bfloat16), Types() as types:
        y, expected = model(x), plain(x)
        y.float().square().sum().backward()
    half = torch.bfloat16
    assert y.dtype is expected.dtype is half
    assert types.read[:6] == [torch.float32 if rule == "in float32" else half] * 6
    torch.testing.assert_close(y, expected, rtol=2**-5, atol=2**-5)
    model.proj = nn.Linear(24, 2)  # any other
    assert model(x).shape == (4, 5, 2)
    seen: list[int] = []
    model.proj.register_forward_hook(lambda *_: seen.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert seen == [1]


def test_float32_in_training_is_pytorch_s() -> None:
    model, x = mlp(), torch.randn(4, 5, 6)
    plain = copy.deepcopy(model)
    convert(model)
    assert torch.equal(model(x), plain(x))
    assert fit.notes[model[2]] == "PyTorch's kernel is as fast there"


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_what_does_not_go_together_is_pytorch_s_error(mode: Any) -> None:
    model = convert(mlp(), mode=mode)
    for x in (torch.randn(4, 7), torch.randn(4, 6).bfloat16()):
        with pytest.raises(RuntimeError), torch.no_grad():
            model(x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        model(torch.randn(4, 6).double())


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_any_strides_run_as_written(mode: Any) -> None:
    model = mlp().eval()
    x = torch.randn(4, 6, 5).mT
    expected = model(x)
    assert torch.equal(convert(model, mode=mode)(x), expected)
    assert fit.notes[model[2]].startswith("its input is not dense")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_what_pytorch_takes_besides_runs_as_written(mode: Any) -> None:
    model, x = mlp().eval().requires_grad_(False), torch.randn(4, 6)
    model[0].weight = nn.Parameter(model[0].weight.to_sparse_csr(), False)
    model[2].bias = nn.Parameter(torch.randn(1), False)  # addmm broadcasts it
    expected = model(x)
    convert(model, mode=mode)
    assert torch.equal(model(x), expected)
    assert fit.notes[model[2]].startswith("its weights are torch.sparse_csr")
    model[0].weight = nn.Parameter(model[0].weight.to_dense(), False)
    torch.testing.assert_close(model(x), expected)
    assert fit.notes[model[2]].startswith("its bias has sizes [1]")
    with pytest.raises(RuntimeError, match="expected 6 features"):
        model(torch.tensor(1.0))


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parametrization_computes_once_a_call(dtype: torch.dtype, mode: Any) -> None:
    calls: list[int] = []

    class Counts(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)  # as spectral_norm's power iteration
            return weight * len(calls)

    model, x = mlp().to(dtype), torch.randn(4, 6, dtype=dtype)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Counts(), unsafe=True)
    convert(model, mode=mode)
    for grads in (True, False):
        for given, error in ((x, None), (x.T.contiguous().T, None), (x[:, 1:], RuntimeError)):
            calls.clear()
            with torch.set_grad_enabled(grads), pytest.raises(error) if error else nullcontext():
                model(given)
            assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_exported_for_any_batch(mode: Any, dtype: torch.dtype) -> None:
    model, rows = mlp().to(dtype).eval(), interface._MANY // 24 + 1
    expected = copy.deepcopy(model)
    batch = {0: torch.export.Dim("batch", min=2, max=2 * rows)}
    program = torch.export.export(
        convert(model, mode=mode), (torch.randn(4, 6, dtype=dtype),), dynamic_shapes=(batch,)
    )
    x = torch.randn(rows, 6, dtype=dtype)
    torch.testing.assert_close(program.module()(x), expected(x))


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_vmap_runs_as_written(mode: Any) -> None:
    model, x = mlp().eval(), torch.randn(4, 5, 6)
    expected = torch.func.vmap(model)(x)
    assert torch.equal(torch.func.vmap(convert(model, mode=mode))(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_compiled_without_graph_breaks(mode: Any) -> None:
    model = convert(mlp().bfloat16().eval(), mode=mode)
    x = torch.randn(4, 5, 6).bfloat16()
    torch.compiler.reset()
    with torch.set_grad_enabled(mode == "train"):
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, model(x), rtol=2**-6, atol=2**-6)


def test_a_hook_on_a_layer_runs() -> None:
    model = convert(mlp())
    x, seen = torch.randn(4, 6), []
    model(x)
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="has hooks now"):
        model(x)
    handle.remove()
    assert seen == [1]


def test_another_classifier_behind_the_fused_layers() -> None:
    # As fine-tuning gives a VGG: behind a dropout it is nobody's part.
    model = mlp(nn.Dropout(0.5))
    convert(model)
    model[3] = nn.Linear(24, 2)
    assert model(torch.randn(4, 6)).shape == (4, 2)
    assert patterns(model) == ["linear-gelu", "dropout"]


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_verify(mode: Any) -> None:
    model = convert(mlp().eval(), mode=mode)
    assert fastcnn.verify(model, torch.randn(4, 5, 6)).ok
    with torch.autocast("cpu", torch.bfloat16):
        assert fastcnn.verify(model, torch.randn(4, 5, 6)).ok


def test_report_names_the_op(capsys: pytest.CaptureFixture[str]) -> None:
    fastcnn.report(convert(mlp()), verbose=True)
    said = capsys.readouterr().out
    assert "linear-gelu > linear" in said
    assert "oneDNN and BLAS through" in said

"""FoldedLinears: weights packed once and kept while nothing changes, types between the layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS
from support.linear_act_cases import HALVES, RULES, Types, answer
from support.roundings import Expected
from torch import Tensor, nn

from fastcnn.ops.linear_act import folded
from fastcnn.ops.linear_act.folded import FoldedLinears

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def never_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let oneDNN run small layers, too."""
    monkeypatch.setattr(folded, "_FEW", 0)


def mlp(act: str = "gelu", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(24, 96), nn.Linear(96, 24, bias=False)
    steps: list[nn.Module] = [layers[0], _Act(act), layers[1]]
    return nn.Sequential(*steps).to(dtype).requires_grad_(False).eval()


class _Act(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTS[self.name](x)


def linears(model: nn.Sequential, act: Any = "gelu") -> FoldedLinears:
    return FoldedLinears([(model[0], act), (model[2], "none")])  # type: ignore[list-item]


def call(run: FoldedLinears, x: Tensor) -> Tensor:
    found = run.known(x) or run.prepare(x)
    assert found is not None
    return found(x)


def check(model: nn.Sequential, y: Tensor, x: Tensor, dtype: torch.dtype, cast: bool) -> None:
    exact = copy.deepcopy(model).double()
    state = torch.float32 if cast else dtype
    Expected(lambda: {"y": exact(x.double())}, dtype, state, autocast=True).check({"y": y})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True),
     (torch.float16, False)],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [(24,), (1, 24), (33, 24), (2, 5, 7, 24)])
def test_against_float64(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    autocast: bool,
    rule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer(rule, monkeypatch)
    model = mlp(dtype=torch.float32 if autocast else dtype)
    x = torch.randn(sizes).to(torch.float32 if autocast else dtype)
    run = linears(model)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        if not folded.folds(x.to(dtype)):
            assert run.prepare(x) is None
            return
        y, again = call(run, x), call(run, x)
    assert y.dtype is dtype
    assert torch.equal(y, again)
    check(model, y, x, dtype, autocast)


@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str) -> None:
    model, x = mlp(act), torch.randn(9, 24)
    check(model, call(linears(model, act), x), x, torch.float32, False)


@pytest.mark.parametrize("dtype", HALVES)
def test_all_is_float32_between(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    answer("in float32", monkeypatch)
    model, x = mlp(dtype=dtype), torch.randn(9, 24).to(dtype)
    run = linears(model)
    with Types() as types:
        y = call(run, x)
    assert set(types.read) == {torch.float32}
    wide = copy.deepcopy(model).float()
    assert torch.equal(y, call(linears(wide), x.float()).to(dtype))


def test_a_float32_layer_without_an_activation_is_pytorch_s() -> None:
    model, x = mlp(), torch.randn(9, 96)
    y = call(FoldedLinears([(model[2], "none")]), x)  # type: ignore[list-item]
    assert torch.equal(y, F.linear(x, model[2].weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [True, False])
def test_large_weights_are_not_packed(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "_LARGE", 24 * 96 + kept)
    packed: list[Tensor] = []
    reorder = folded._reorder
    monkeypatch.setattr(folded, "_reorder", lambda *a: (packed.append(a[0]), reorder(*a))[1])
    model, x = mlp(), torch.randn(9, 24)
    run = linears(model)
    for _ in range(2):
        check(model, call(run, x), x, torch.float32, False)
    assert len(packed) == kept


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "written in place": lambda m: m[0].weight.mul_(2),  # type: ignore[operator]
    "a bias": lambda m: m[0].bias.add_(1),  # type: ignore[operator]
    "through .data": lambda m: m[0].weight.data.mul_(2),  # type: ignore[operator]
    "loaded": lambda m: m.load_state_dict({k: 2 * t for k, t in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict(
        {k: 2 * t for k, t in m.state_dict().items()}, assign=True
    ),
    "another parameter": lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight * 2, False)),  # type: ignore[operator]
    "another type and back": lambda m: m.double().float(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_seen(name: str) -> None:
    model = mlp()
    run = linears(model)
    xs = torch.randn(9, 24), torch.randn(5, 24)
    for x in xs:
        call(run, x)
    CHANGES[name](model)
    for x in xs:
        check(model, call(run, x), x, torch.float32, False)


def test_nothing_is_kept_where_a_gradient_is_asked() -> None:
    model = mlp()
    run, x = linears(model), torch.randn(9, 24)
    call(run, x)
    assert run.known(x.clone().requires_grad_()) is None
    model.requires_grad_()
    assert run.known(x) is None
    assert run.prepare(x) is None
    with torch.no_grad():
        assert call(run, x).grad_fn is None


def test_inference_mode_before_and_after() -> None:
    model = mlp()
    run, x = linears(model), torch.randn(9, 24)
    with torch.inference_mode():
        first = call(run, x)
    assert torch.equal(call(run, x), first)


def test_another_thread_may_forget_what_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    # As one that asks for gradients, at the same time.
    model, x = mlp(), torch.randn(9, 24)
    run, check_linear = linears(model), folded.check_linear

    def meanwhile(*tensors: Any) -> None:
        check_linear(*tensors)
        run.refresh()

    monkeypatch.setattr(folded, "check_linear", meanwhile)
    for _ in range(2):
        check(model, call(run, x), x, torch.float32, False)
    model[0].weight.mul_(2)  # type: ignore[operator]
    check(model, call(run, x), x, torch.float32, False)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"linear_act: input: expected sizes \[\.\.\., 24\]"):
        linears(mlp()).prepare(torch.randn(9, 23))

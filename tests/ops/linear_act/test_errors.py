"""What linear_act refuses: TypeError or ValueError that names the argument, expected and got."""

from typing import Any

import pytest
import torch

from fastcnn.functional import linear_act
from fastcnn.nn import LinearAct

X, WEIGHT, BIAS = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, r"input: expected a Tensor, got list"),
    ({"input": X.long()}, TypeError, r"input: expected float32, .*, got torch.int64"),
    ({"input": X.mT}, ValueError, r"input: expected a contiguous tensor, .* call input.contiguous"),
    ({"input": X[..., :3].contiguous()}, ValueError, r"\[\.\.\., 4\] .* got \[2, 3, 3\]"),
    ({"input": torch.ones(())}, ValueError, r"input: expected sizes \[\.\.\., 4\] .* got \[\]"),
    ({"weight": 1}, TypeError, r"weight: expected a Tensor, got int"),
    ({"weight": WEIGHT[None]}, ValueError, r"weight: expected 2 dimensions .* got \[1, 5, 4\]"),
    ({"weight": WEIGHT.half()}, TypeError, r"weight: expected torch.float32 beside .*, got .*16"),
    ({"weight": WEIGHT.to("meta")}, ValueError, r"weight: expected device cpu, got meta"),
    ({"bias": BIAS[:4]}, ValueError, r"bias: expected 5 numbers, .* got sizes \[4\]"),
    ({"bias": BIAS.double()}, TypeError, r"bias: expected torch.float32 beside .*, got .*64"),
    ({"act": "tanh"}, ValueError, r"act: expected one of none, relu, .*, got 'tanh'"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS)
def test_invalid_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^linear_act: .*{message}"):
        linear_act(**{"input": X, "weight": WEIGHT, "bias": BIAS, **bad})


def test_the_module_refuses_an_activation_at_once() -> None:
    with pytest.raises(ValueError, match="LinearAct: act: expected one of none, relu"):
        LinearAct(3, 3, act="tanh")  # type: ignore[arg-type]

"""What a user of dropout gets wrong: the error names the argument, expected and got."""

import re
from typing import Any

import pytest
import torch

from fastcnn.functional import dropout

X = torch.randn(2, 3, 4, 4)
BIG = torch.randn(2, 5, 8, 8)
HALF = X.bfloat16()
C3 = torch.ones(3)

# What replaces a good argument of dropout, the error, and what its message names.
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, r"input: expected a Tensor, got list"),
    ({"input": X.long()}, TypeError, r"input: expected float32, .*, got torch.int64"),
    ({"input": X.mT}, ValueError, r"input: expected a dense NCHW or channels_last .*; call"),
    # torch.nn.functional.dropout copies these unasked.
    ({"input": X[0].mT}, ValueError, r"expected a contiguous .*; call input.contiguous\(\) first"),
    ({"input": BIG[0, 0, ::2]}, ValueError, r"expected a contiguous .*call input.contiguous"),
    ({"input": C3.expand(2, 3)}, ValueError, r"strides \[0, 1\]; call input.contiguous\(\) first"),
    (
        {"input": X[None].contiguous(memory_format=torch.channels_last_3d)},
        ValueError,
        r"expected a contiguous .* \[1, 2, 3, 4, 4\].*; call input.contiguous\(\) first",
    ),
    ({"residual": X.mT}, ValueError, r"residual: expected a dense .*; call residual.contiguous"),
    ({"input": C3, "per_channel": True}, ValueError, r"input: expected at least 3 .*got \[3\]"),
    ({"p": 1.5}, ValueError, r"p: expected a probability from 0 to 1, got 1.5"),
    ({"p": -0.1}, ValueError, r"p: expected a probability from 0 to 1, got -0.1"),
    ({"p": float("nan")}, ValueError, r"p: expected a probability from 0 to 1, got nan"),
    ({"p": "half"}, TypeError, r"p: expected a number, got str"),
    ({"residual": X[:1]}, ValueError, r"residual: expected sizes \[2, 3, 4, 4\], got \[1, 3, 4, 4"),
    ({"residual": HALF}, TypeError, r"residual: expected torch.float32 .*, got torch.bfloat16"),
    ({"input": C3, "residual": X}, ValueError, r"residual: expected sizes \[3\], got \[2, 3, 4"),
    ({"generator": 5}, TypeError, r"generator: expected a torch.Generator, got int"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("bad", "error", "message"), ERRORS)
def test_arguments(
    bad: dict[str, Any], error: type[Exception], message: str, training: bool
) -> None:
    # In evaluation too: else a mistake would wait for the first training step.
    with pytest.raises(error, match=f"^dropout: .*{message}"):
        dropout(**{"input": X, "training": training, **bad})


RESIDUALS = {
    "sizes [2, 48] as x, got [4, 24]": (X.reshape(2, 48), X.reshape(4, 24)),
    "sizes [2, 3, 16] as x, got [2, 3, 4, 4]": (X.reshape(2, 3, 16), X),
    "sizes [2, 3, 4, 4] as x, got [2, 3, 16]": (X, X.reshape(2, 3, 16)),
    "a contiguous tensor, got sizes [3, 4, 4] with other strides; call .contiguous() first": (
        X[0],
        X[0].mT,
    ),
}


@pytest.mark.parametrize("message", RESIDUALS)
@pytest.mark.parametrize("op", ["dropout_apply", "dropout_apply_"])
def test_the_operator_takes_no_residual_of_other_sizes(op: str, message: str) -> None:
    # As many elements are not enough: the flat views that the kernels read would agree.
    x, residual = RESIDUALS[message]
    run = getattr(torch.ops.fastcnn, op)
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: residual: expected {message}")):
        run(x.clone(), residual, torch.tensor(1), 0.5, False)

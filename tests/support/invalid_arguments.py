"""What could lead a kernel astray, in place of an operator's good arguments."""

from collections.abc import Callable
from typing import Any

import torch
from support.shapes import LAYOUTS
from torch import Tensor

IMAGES = ("x", "xs", "z", "residual", "saved", "dy", "skip", "y", "acc", "add", "in_raw", "out_raw")


def without_storage(t: Tensor, kept: float, offset: int = 0) -> Tensor:
    """Return t's sizes and strides over a storage that has shrunk since."""
    storage = torch.cat([t.new_zeros(offset), t.flatten()]).untyped_storage()
    view = t.new_empty(0).set_(storage, offset, t.shape, t.stride())
    storage.resize_(int(storage.nbytes() * kept))
    return view


# Memory that sizes and strides reach is not there: no kernel may run, whatever else is wrong.
STORAGE: dict[str, Callable[[Tensor], Any]] = {
    "storage freed": lambda t: without_storage(t, 0),
    "storage freed behind an offset": lambda t: without_storage(t, 0, 5),
    "storage halved": lambda t: without_storage(t, 0.5),
    "storage without its last byte": lambda t: without_storage(t, 1 - 0.5 / t.nbytes),
}
ANY: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "no tensor": lambda t: "x",
    "a number": lambda t: 1.0,
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "other float": lambda t: t.half() if t.dtype == torch.float64 else t.double(),
    "another half": lambda t: t.half() if t.dtype == torch.bfloat16 else t.bfloat16(),
    "meta": lambda t: t.to("meta"),
    "on the CPU": lambda t: t.cpu(),
    "sparse": lambda t: t.to_sparse(),
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "huge strides": lambda t: t.new_zeros(t.numel() * 64).as_strided(
        t.shape, [64 * s for s in t.stride()]
    ),
    "empty": lambda t: t[:0],
    "shorter": lambda t: t[:1],
    "longer": lambda t: torch.cat([t, t]),
    "another dimension": lambda t: t[None],
    "a dimension less": lambda t: t[0],
    "no dimension": lambda t: t.flatten()[0],
    **STORAGE,
}
IMAGE: dict[str, Callable[[Tensor], Any]] = {
    "overlapping": lambda t: t.as_strided(t.shape, (1, 1, 1, 1)),
    "channel less": lambda t: t[:, 1:].clone(),
    "column less": lambda t: t[..., 1:].clone(),
    "transposed": lambda t: t.mT,
    "permuted": lambda t: t.permute(0, 2, 1, 3),
    "the other layout": lambda t: t.contiguous(
        memory_format=LAYOUTS["channels_last" if t.is_contiguous() else "nchw"]
    ),
}
CHANNELS: dict[str, Callable[[Tensor], Any]] = {"strided": lambda t: t.repeat_interleave(2)[::2]}
NUMBERS: dict[str, list[Any]] = {
    "gate": [-1, 2, 2**31, -(2**63), None, "sigmoid"],
    "act": [-1, 8, 2**31, -(2**63), 2**63 - 1, None, "relu"],
    "count": [1, 0, -5, -(2**63), None, "x"],  # without a total
    **{
        key: [-1e-5, -float("inf"), float("nan"), None, "x"] for key in ("eps", "in_eps", "out_eps")
    },
    **{key: [-1, 8, 2**31, 2**62, None, "x"] for key in ("in_act", "out_act")},
    "groups": [0, -1, 4, 7, 2**62, -(2**63), None, "x"],
    "momentum": [-0.1, 1.1, float("nan"), None, "x"],
    "total": [torch.ones(2), torch.ones(()), torch.ones(1, dtype=torch.int64), "x"],
    "p": [-0.1, 1.1, float("nan"), float("inf"), None, "x"],
    "h": [0, -1, 3, 2**31, 2**62, None, "x"],
    "w": [0, -1, 3, 2**31, 2**62, None, "x"],
    "scale_h": [0.0, -1.0, 0.3, float("nan"), float("inf"), "x"],
    "scale_w": [0.0, -2.0, 2.6, float("nan"), float("inf"), "x"],
    "sampling": [-1, 4, 2**40, None, "x"],
    **{
        key: [0, -1, 2, 2**21, 2**62, None, "x"]
        for key in ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w")
    },
    **{key: [-1, 2, 2**21, 2**62, None, "x"] for key in ("padding_h", "padding_w")},
    **{
        key: [0.0, -1.0, float("nan"), float("inf"), "x"] for key in ("out_scale", "residual_scale")
    },
    "x_scale": [0.0, -1.0, float("nan"), float("inf"), None, "x"],
    **{key: [-1, 256, 2**62, None, "x"] for key in ("x_zero_point", "out_zero_point")},
    **{key: [-1, 256, 2**62, None, "x"] for key in ("residual_zero_point", "zero_point")},
    "cap": [0.0, -1.0, float("nan"), None, "x"],
    "out_dtype": [torch.int32, torch.float64, None, "x"],
    **{key: [[0, 1], [1], [2**40, 1], None, "x"] for key in ("stride", "dilation")},
    "padding": [[-1, 1], [1], [2**40, 1], None, "x"],
    "channels_last": ["x"],  # None is False to the dispatcher
}
# Of one operator's, where others see sense in these.
NUMBERS_OF: dict[tuple[str, str], list[Any]] = {
    **{
        (op, size): [0, -1, 2**62, None, "x"] for op in ("augment", "augment_mask") for size in "hw"
    },
    ("augment", "dtype"): [-1, 3, 2**31, None, "x"],
    ("augment_mask", "fill"): [None],
    ("conv2d_int8_epilogue", "residual_scale"): [0.0, -1.0, float("nan"), None, "x"],
    # None of which, nor two or three, fit an image that has a column less: a kernel of 2 would.
    **{
        (op, side): [0, -1, 9, 2**21, 2**62, None, "x"]
        for op in ("conv2d_bwd_weight", "depthwise_conv2d_bwd_weight")
        for side in ("kernel_h", "kernel_w")
    },
    **{
        ("conv2d_bwd_weight", side): [-1, 5, 2**21, 2**62, None, "x"]
        for side in ("padding_h", "padding_w")
    },
}


def spoiled(given: Any, spoil: Callable[[Tensor], Any]) -> Any:
    """An argument, of several tensors the last one."""
    return [*given[:-1], spoil(given[-1])] if isinstance(given, list) else spoil(given)


def numbers(op: str, name: str) -> list[Any]:
    return NUMBERS_OF.get((op, name), NUMBERS.get(name, []))

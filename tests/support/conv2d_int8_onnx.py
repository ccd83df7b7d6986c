"""ONNX's QLinearConv, as onnx.reference computes it: an oracle of conv2d_int8."""

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

ONNX_TYPES = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8}


def onnx_qlinear_conv(given: dict[str, Any], bias_units: Tensor | None) -> Tensor:
    x, weight, out_dtype = given["x"], given["weight"], given["out_dtype"]
    pair = lambda value: list(value) if isinstance(value, tuple) else [value, value]  # noqa: E731
    to_numpy = lambda t: t.contiguous().numpy()  # noqa: E731
    feeds = {
        "x": to_numpy(x),
        "x_scale": np.array(given["x_scale"], np.float32),
        "x_zero": to_numpy(torch.tensor(given["x_zero_point"], dtype=x.dtype)),
        "w": to_numpy(weight),
        "w_scale": to_numpy(given["weight_scale"]),
        "w_zero": np.array(0, np.int8),
        "y_scale": np.array(given["out_scale"], np.float32),
        "y_zero": to_numpy(torch.tensor(given["out_zero_point"], dtype=out_dtype)),
    }
    if bias_units is not None:
        feeds["b"] = to_numpy(bias_units.int())
    node = helper.make_node(
        "QLinearConv", list(feeds), ["y"], strides=pair(given["stride"]),
        pads=2 * pair(given["padding"]), dilations=pair(given["dilation"]), group=given["groups"],
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in feeds]
    output = helper.make_tensor_value_info("y", ONNX_TYPES[out_dtype], None)
    model = helper.make_model(helper.make_graph([node], "convolution", inputs, [output]))
    return torch.from_numpy(ReferenceEvaluator(model).run(None, feeds)[0])

"""Quantised outputs of conv2d_int8 in numpy: onnx.reference's sums, and float32 from there on."""

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor


def onnx_sums(given: dict[str, Any]) -> Any:
    """Return what ConvInteger gives, int32."""
    pair = lambda value: list(value) if isinstance(value, tuple) else [value, value]  # noqa: E731
    x = given["x"].contiguous().numpy()
    feeds = {
        "x": x,
        "w": given["weight"].contiguous().numpy(),
        "x_zero": np.array(given["x_zero_point"], x.dtype),
    }
    node = helper.make_node(
        "ConvInteger", list(feeds), ["y"], strides=pair(given["stride"]),
        pads=2 * pair(given["padding"]), dilations=pair(given["dilation"]), group=given["groups"],
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in feeds]
    output = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    model = helper.make_model(helper.make_graph([node], "sums", inputs, [output]))
    return ReferenceEvaluator(model).run(None, feeds)[0]


def requantised(given: dict[str, Any], units: Tensor) -> Tensor:
    """Return y, whose bounds are taken of integers. units: the bias, in x_scale * weight_scale."""
    f = np.float32
    out_scale, info = f(given["out_scale"]), torch.iinfo(given["out_dtype"])
    factor = f(given["x_scale"]) * given["weight_scale"].numpy() / out_scale
    z = (onnx_sums(given) + units.int().numpy()[:, None, None]).astype(f) * factor[:, None, None]
    residual = given.get("residual")
    if residual is not None:
        r = residual.contiguous().numpy().astype(np.int32) - given["residual_zero_point"]
        z = z + r.astype(f) * (f(given["residual_scale"]) / out_scale)
    assert z.dtype == f
    q = np.rint(z).astype(np.int64)
    if given["act"] != "none":
        q = np.maximum(q, 0)
    if given["act"] == "relu6":
        q = np.minimum(q, np.rint(f(6) / out_scale).astype(np.int64))
    q = np.clip(q + given["out_zero_point"], info.min, info.max)
    return torch.from_numpy(q).to(given["out_dtype"])

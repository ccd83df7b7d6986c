"""Good arguments of every operator: ops/test_invalid_arguments.py makes bad ones of them."""

from typing import Any

import torch
from support.shapes import LAYOUTS
from torch import Tensor

from fastcnn import _C

OPERATORS = [
    "batch_norm_act_fwd", "batch_norm_act_apply", "batch_norm_act_bwd", "batch_norm_act_stats",
    "batch_norm_act_reduce", "batch_norm_act_dx", "batch_norm_join_stats",
    "batch_norm_act_concat_fwd", "batch_norm_act_concat_apply", "batch_norm_act_concat_bwd",
    "batch_norm_update_running", "conv2d_int8", "conv2d_int8_epilogue", "conv2d_fused",
    "upsample_fwd", "upsample_bwd",
    "upsample_taps_fwd", "upsample_taps_bwd", "augment", "augment_mask", "dropout_apply",
    "dropout_apply_", "group_norm_act_fwd", "group_norm_act_bwd", "pixel_norm_act_fwd",
    "pixel_norm_act_bwd", "depthwise_conv2d_fwd", "depthwise_conv2d_bwd_act",
    "depthwise_conv2d_bwd_data", "depthwise_conv2d_bwd_weight", "conv2d_winograd_fwd",
    "conv2d_winograd_bwd_weight", "squeeze_excite_fwd", "squeeze_excite_bwd",
    "inverted_residual_fwd", "pointwise_conv2d_fwd",
]  # fmt: skip
PYTORCHS_OWN = ["clone_no_cse", "conv2d_relu"]  # under another name, with its checks
OPERATORS += ["conv2d_bwd_weight"] * _C.has_bf16_dot()  # elsewhere it raises in any case


def good_arguments(op: str, dtype: torch.dtype, layout: str, w: int = 4) -> dict[str, Any]:
    """Return an operator's arguments by name, images 4 high and an even number of pixels wide.

    Square they are as large when they are transposed.
    """

    def image() -> Tensor:
        return torch.randn(2, 6, 4, w).to(dtype).contiguous(memory_format=LAYOUTS[layout])

    if op.startswith("augment"):
        table, size = torch.ones(2, 17), {"h": 5, "w": 3}
        if op == "augment_mask":
            return {"masks": torch.ones(2, 4, w).long(), "reals": table, **size, "fill": 255}
        images = torch.ones(2, 3, 4, w).byte().contiguous(memory_format=LAYOUTS[layout])
        tables = {"integers": torch.ones(2, 5).long(), "channels": torch.ones(3, 4)}
        rest = {"dtype": 1, "channels_last": True}
        return {"images": images, "reals": table, **tables, **size, **rest}
    acc = torch.promote_types(dtype, torch.float32)
    c = [torch.ones(6, dtype=acc) for _ in range(4)]
    norm: dict[str, Any] = {"weight": c[0], "bias": c[1]}
    stats, rest = {"mean": c[2], "var": c[3]}, {"eps": 1e-5, "act": 1}
    if op.startswith("dropout"):
        seed = {"seed": torch.tensor([5]), "p": 0.3, "per_channel": True}
        return {"x": image(), "residual": image(), **seed}
    if op.startswith(("group_norm_act", "pixel_norm_act")):
        per_pixel = op.startswith("pixel")
        groups = {} if per_pixel or op.endswith("bwd") else {"groups": 3}
        if op.endswith("fwd"):
            return {"x": image(), **norm, **groups, **rest}
        matrices = {
            name: torch.ones(2, 4 * w if per_pixel else 3, dtype=c[0].dtype) for name in stats
        }
        return {"dy": image(), "x": image(), **norm, **matrices, **rest}
    if op.startswith("batch_norm_act_concat"):
        last = torch.randn(2, 2, 4, w).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        xs = {"xs": [image()[:, :4].contiguous(memory_format=LAYOUTS[layout]), last]}
        if op.endswith("bwd"):
            more = {"training": True, "want_dresidual": True}
            return {"dy": image(), **xs, "saved": image(), **norm, **stats, **rest, **more}
        given = stats if op.endswith("apply") else {}
        return {**xs, "residual": image(), **norm, **given, **rest}
    if op == "batch_norm_act_fwd":
        return {"x": image(), "residual": image(), **norm, **rest}
    if op == "batch_norm_act_apply":
        return {"x": image(), "residual": image(), **norm, **stats, **rest}
    if op == "batch_norm_act_stats":
        return {"x": image()}
    if op == "batch_norm_join_stats":
        return {"gathered": torch.ones(3, 13, dtype=acc)}
    images = {"dy": image(), "x": image(), "saved": image()}
    if op == "batch_norm_act_bwd":
        return {**images, **norm, **stats, **rest, "training": True, "want_dresidual": True}
    if op == "batch_norm_act_reduce":
        return {**images, **norm, **stats, **rest, "want_dresidual": True}
    if op == "batch_norm_act_dx":
        sums = {"dweight": c[0].clone(), "dbias": c[1].clone(), "total": c[0][:1].clone()}
        return {**images, **norm, **stats, **sums, **rest, "training": True}
    if op.startswith("upsample_taps"):  # channels_last alone
        layout, sizes = "channels_last", {"h": 4, "w": w // 2 if op.endswith("bwd") else w}
        how = {"scale_h": 1.0, "scale_w": 2.0, "sampling": 2}
        if op.endswith("bwd"):
            return {"dy": image(), **sizes, **how}
        z = torch.randn(2, 18, 4, w // 2).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        return {"z": z, **sizes, **how}
    if op.startswith("upsample"):
        how = {"scale_h": 1.0, "scale_w": 2.0, "sampling": 2}
        how["channels_last"] = layout == "channels_last"
        if op == "upsample_bwd":
            return {"dy": image(), "h": 4, "w": w // 2, **how}
        tall = image()[..., : w // 2].contiguous(memory_format=LAYOUTS[layout])
        return {"x": tall, "skip": image(), "h": 4, "w": w, **how, "skip_last": True}
    if op == "clone_no_cse":
        return {"t": image()}
    if op == "conv2d_relu":
        how = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
        weight = torch.ones(6, 6, 3, 3, dtype=dtype)
        return {"x": image(), "weight": weight, "bias": weight[:, 0, 0, 0].clone(),
                "residual": image(), **how}  # fmt: skip
    if op == "conv2d_bwd_weight":
        dtype, layout = torch.bfloat16, "channels_last"
        how = {"kernel_h": 3, "kernel_w": 3, "stride_h": 1, "stride_w": 1}
        how |= {"padding_h": 1, "padding_w": 1, "dilation_h": 1, "dilation_w": 1}
        return {"dy": image(), "x": image(), **how}
    if op.startswith("conv2d_winograd"):
        dtype = torch.float32 if dtype is torch.float64 else dtype
        layout, padding = "channels_last", {"padding_h": 1, "padding_w": 1}
        if op.endswith("bwd_weight"):
            return {"dy": image(), "x": image(), **padding}
        more = {"bias": torch.ones(6), "residual": image()}
        return {"x": image(), "u": torch.ones(36, 6, 6), **more, **padding, "act": 1}
    if op.startswith("depthwise_conv2d"):
        how = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
        given = {"weight": torch.ones(6, 1, 3, 3, dtype=acc)}
        if op == "depthwise_conv2d_bwd_data":
            last = {"channels_last": layout == "channels_last"}
            return {"dy": image(), **given, "h": 4, "w": w, **how, **last}
        if op == "depthwise_conv2d_bwd_weight":
            return {"dy": image(), "x": image(), "kernel_h": 3, "kernel_w": 3, **how}
        call = {"x": image(), **given, "bias": c[1], **how, "act": 4}
        return call if op.endswith("fwd") else {"dy": image(), **call}
    if op in ("pointwise_conv2d_fwd", "inverted_residual_fwd"):
        layout, wide = "channels_last", torch.ones(20, dtype=acc)
        residual = torch.cat([image()] * 4, 1)[:, :20].contiguous(memory_format=LAYOUTS[layout])
        panels = torch.ones(2, 6, 16, dtype=acc)
        if op == "pointwise_conv2d_fwd":
            more = {"bias": wide, "residual": residual, "act": 4}
            return {"x": image(), "weight": panels, "c_out": 20, **more}
        expand = {"expand": panels, "expand_bias": wide, "expand_act": 1}
        how = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "act": 2}
        between = {"weight": torch.ones(20, 1, 3, 3, dtype=acc), "bias": wide.clone(), **how}
        project = {"project": torch.ones(2, 20, 16, dtype=acc), "c_out": 20}
        last = {**project, "project_bias": wide.clone(), "project_act": 0, "residual": residual}
        return {"x": image(), **expand, **between, **last}
    if op.startswith("squeeze_excite"):
        fcs = [torch.ones(*size, 1, 1, dtype=acc) for size in ((5, 6), (6, 5))]
        names = {"act": 4, "gate": 1}
        if op.endswith("fwd"):
            fc1 = {"x": image(), "fc1": fcs[0], "bias1": torch.ones(5, dtype=acc)}
            return {**fc1, "fc2": fcs[1], "bias2": c[0], **names}
        z = {"z1": torch.ones(2, 5, dtype=acc), "z2": torch.ones(2, 6, dtype=acc)}
        return {"dy": image(), "x": image(), "fc1": fcs[0], "fc2": fcs[1], **z, **names}
    if op == "conv2d_fused":
        dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        layout = "channels_last"
        weight = {"weight": torch.ones(6, 6, 3, 3, dtype=dtype)}
        bn = {f"bn_{key}": torch.ones(6) for key in ("mean", "var", "weight", "bias")}
        rest = {"bn_eps": 1e-5, "residual": image(), "act": 1, "statistics": True}
        how = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
        return {"x": image(), **weight, **bn, **rest, **how}
    if op.startswith("conv2d_int8"):
        layout = "channels_last"
        q = image().mul(20).to(torch.uint8)
        scales = {"residual_scale": 0.1, "residual_zero_point": 3}
        if op == "conv2d_int8_epilogue":
            sums = {
                "acc": image().float(),
                "multiplier": torch.ones(6),
                "bias": torch.ones(6).int(),
            }
            return {"y": q.clone(), **sums, "residual": q, **scales, "act": 2, "cap": 6.0,
                    "zero_point": 3}  # fmt: skip
        weight = {"weight": torch.ones(6, 6, 3, 3).char(), "weight_scale": torch.ones(6)}
        how = {"out_scale": 0.1, "out_zero_point": 3, "out_dtype": torch.uint8}
        how |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "act": 1}
        return {"x": q, **weight, "bias": torch.ones(6), "residual": q.clone(), "x_scale": 0.1,
                "x_zero_point": 3, **scales, **how}  # fmt: skip
    running = {"running_mean": c[0], "running_var": c[1], **stats}
    return {**running, "total": None, "momentum": 0.1, "count": 9}


# Of an operator what else may be given in its place, each alone.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "squeeze_excite_fwd": [{"gate": 0, "act": 1}],
    "squeeze_excite_bwd": [{"gate": 0, "act": 1}],
    "batch_norm_act_bwd": [{"want_dresidual": False}, {"saved": None}],
    "batch_norm_act_concat_bwd": [{"want_dresidual": False}, {"saved": None}, {"training": False}],
    "batch_norm_act_reduce": [{"want_dresidual": False}, {"saved": None}],
    "batch_norm_act_dx": [{"saved": None}, {"training": False}],
    "batch_norm_update_running": [{"total": torch.tensor([60.0])}],
    "dropout_apply": [{"per_channel": False}],
    "dropout_apply_": [{"per_channel": False}],
    **{
        f"depthwise_conv2d_{way}": [{"dilation": [2, 1], "padding": [2, 1]}]
        for way in ("fwd", "bwd_act", "bwd_data", "bwd_weight")
    },
    "upsample_fwd": [{"skip_last": False}, {"scale_h": None, "scale_w": None, "sampling": 3}],
    "upsample_bwd": [{"scale_h": None, "scale_w": None, "sampling": 3}],
    "upsample_taps_fwd": [{"scale_h": None, "scale_w": None, "sampling": 3}],
    "upsample_taps_bwd": [{"scale_h": None, "scale_w": None, "sampling": 3}],
    "augment": [
        {"dtype": dtype, "channels_last": last} for dtype in range(3) for last in (False, True)
    ],
}
NO_RESIDUAL = {"residual": None, "residual_scale": None, "residual_zero_point": None}
WITHOUT: dict[str, dict[str, Any]] = {
    "conv2d_int8": {**NO_RESIDUAL, "bias": None},
    "conv2d_int8_epilogue": {"residual": None},
    "upsample_fwd": {"skip": None},
    "depthwise_conv2d_fwd": {"bias": None},
    "squeeze_excite_fwd": {"bias1": None, "bias2": None},
    "depthwise_conv2d_bwd_act": {"bias": None},
    **{
        op: {"residual": None, "weight": None, "bias": None}
        for op in OPERATORS
        if op.startswith(("batch_norm_act", "group_norm", "pixel_norm", "dropout"))
    },
}


def variants(op: str, good: dict[str, Any]) -> list[dict[str, Any]]:
    """Return good arguments, those without what may be left out, and those with other options."""
    without = {k: v for k, v in WITHOUT.get(op, {}).items() if k in good}
    changes = [{}, without, *OTHERS.get(op, [])]
    if op == "conv2d_int8":
        float_residual = good["residual"].bfloat16()
        changes.append({"residual": good["residual"].view(torch.int8)})
        floats = {"out_dtype": torch.bfloat16, "out_scale": None, "out_zero_point": None}
        changes.append({**NO_RESIDUAL, "residual": float_residual, **floats})
    return [good | change for change in changes]

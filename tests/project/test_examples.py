"""The examples run, in tiny sizes; the notebook's cells in order, without jupyter."""

import contextlib
import io
import json
import runpy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles  # timm beside a CPU torch
from support.paths import ROOT
from support.tolerance import unit_roundoff

from fastcnn.convert.converted import Converted

EXAMPLES = ROOT / "examples"
assert oracles.timm


def run(name: str, *arguments: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"](arguments)


def converted(model: torch.nn.Module) -> bool:
    return any(isinstance(module, Converted) for module in model.modules())


def test_finetune_timm(capsys: pytest.CaptureFixture[str]) -> None:
    model, losses = run(
        "finetune_timm.py", "--from-scratch", "--steps", "2", "--size", "32", "--batch", "4"
    )
    assert converted(model)
    assert len(losses) == 2
    # ln 10 is the loss of a guess; fresh weights start near it.
    assert all(0 < loss < 10 for loss in losses)
    printed = capsys.readouterr().out
    assert "layer1.0" in printed  # the report
    assert f"step 2/2  loss {losses[1]:.3f}" in printed


def test_segment_unet() -> None:
    model, ious = run(
        "segment_unet.py", "--steps", "25", "--size", "32", "--batch", "4", "--width", "8"
    )
    assert converted(model)
    assert len(ious) == 25
    # All pixels as ink have an IoU of ink's share, about a half of an image: it learns more.
    assert all(0 <= iou <= 1 for iou in ious)


def test_quantise_layer() -> None:
    found = run("quantise_layer.py", "--size", "64")
    x, weight, scale = found["x"], found["weight"], found["weight_scale"]
    # x has no error of its own. A weight errs by half its scale, so a sum by that times |x|; the
    # output by half of out_scale; saturation by nothing, as its range is known. Roundings of
    # float32: of 147 products and a few more.
    sums = F.conv2d(x.abs(), torch.ones_like(weight), stride=2, padding=3)
    half = scale.view(-1, 1, 1) / 2
    sizes = F.conv2d(x.abs(), weight.abs(), stride=2, padding=3)
    roundings = 160 * unit_roundoff(torch.float32) * (sizes + sums * half)
    assert (found["error"] <= sums * half + found["out_scale"] / 2 + roundings).all()


def test_the_notebook() -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    scope: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in notebook["cells"]:
            assert set(cell) >= {"cell_type", "id", "metadata", "source"}
            if cell["cell_type"] == "code":
                assert cell["outputs"] == []  # results are of a machine
                exec("".join(cell["source"]), scope)
    assert scope["losses"][-1] < scope["losses"][0]
    assert not converted(scope["model"])  # reverted
    for text in ("x as fast as eager", "saved for backward", "differs by"):
        assert text in printed.getvalue()

"""Planning where it counts: candidates timed and checked on a GPU, remembered, refused."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import DEVICE, HAS_GPU
from support.gpu_networks import batch, expected_results, networks, results
from support.gpu_plans import planned_by, wherever_it_can
from support.paths import TESTS
from support.seeds import seed_all
from torch import Tensor

import fastcnn.plan
import fastcnn.plan.tune
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv_bn_act import interface as conv_bn_act_op
from fastcnn.ops.conv_bn_act.candidates import FWD
from fastcnn.plan import OPS, Problem
from fastcnn.plan.environment import environment_of
from fastcnn.plan.plan_file import PlanFile
from fastcnn.plan.planner import Planner

pytestmark = pytest.mark.gpu


# A process that trains a bottleneck once. On a GPU it is one of ResNet-50's at batch 32; without
# one a tiny step, timed once, in the interpreter.
TRAIN = """
import hashlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from support.device import DEVICE, HAS_GPU
from support.seeds import seed_all
import fastcnn.plan.tune
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv_bn_act import interface as op

if not HAS_GPU:
    from support import triton_interpreter
    op.is_planned = lambda x: True
    fastcnn.plan.tune.REPEATS, fastcnn.plan.tune.WARMUP = 1, 0
if os.environ["FASTCNN_PLAN"] == "read":
    def never(*_):
        raise AssertionError("a candidate is run")
    fastcnn.plan.tune._checked = never
torch.backends.cudnn.deterministic = True
seed_all(0)
wide, narrow, images = (256, 64, (32, 256, 56, 56)) if HAS_GPU else (16, 16, (1, 16, 3, 4))
layers = [(wide, narrow, 1), (narrow, narrow, 3), (narrow, wide, 1)][: 3 if HAS_GPU else 1]
half = torch.bfloat16 if HAS_GPU else torch.float32
steps = []
for c_in, c_out, size in layers:
    conv = torch.nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False).to(half)
    conv = conv.to(DEVICE, memory_format=torch.channels_last)
    steps.append((conv, BatchNormAct2d(c_out).to(DEVICE)))
x = torch.randn(images).to(DEVICE, half, memory_format=torch.channels_last).requires_grad_()
y = conv_bn_act(x, steps, x)
y.float().square().mean().backward()
found = [y, x.grad, *(p.grad for step in steps for m in step for p in m.parameters())]
digest = hashlib.sha256()
for t in found:
    digest.update(t.detach().float().cpu().contiguous().numpy().tobytes())
rows = [list(row) for row in fastcnn.plan.rows()]
print(json.dumps({"rows": rows, "digest": digest.hexdigest()}))
"""


def trained(mode: str, cache: Path) -> dict[str, Any]:
    """What a process of its own has planned and computed; a refusal's warning ends it."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", TRAIN, str(TESTS)]
    env = os.environ | {"FASTCNN_PLAN": mode, "FASTCNN_CACHE": str(cache)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tuned_once_and_read_by_the_next_process(tmp_path: Path) -> None:
    # Every candidate was right, or the first process would have warned; the second times and checks
    # nothing, chooses the same and computes the same bits, and leaves the file as it is.
    first = trained("tune", tmp_path)
    (file,) = (tmp_path / "plans").glob("*.json")
    written = file.read_bytes()
    second = trained("read", tmp_path)
    assert file.read_bytes() == written
    assert second == first
    assert len(first["rows"]) == (3 if HAS_GPU else 1)
    for problem, plan, source, reason, milliseconds in first["rows"]:
        assert source == "tuned", problem
        assert milliseconds > 0
        assert plan in reason
        assert "triton" in reason, "Triton's kernels took no part"
        assert "refused" not in reason


@pytest.mark.parametrize("plan", ["cudnn", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_plan_trains_as_exactly(
    plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A whole network, so that what one kernel leaves to the next fits together: statistics from an
    # epilogue.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fused, plain = networks()
    x, target = batch(n=8 if HAS_GPU else 2)
    autocast = None if dtype is torch.float32 else dtype
    expected = expected_results(plain, x, target, autocast)
    casts = torch.autocast(DEVICE.type, dtype, enabled=autocast is not None)
    with casts, planned_by(partial(wherever_it_can, plan)):
        expected.check(results(fused, x, target))


def step_of(*sizes: int) -> list[Tensor]:
    """A step in front of another, trained: the output of both, and x's gradient."""
    c, dtype = sizes[1], torch.bfloat16 if HAS_GPU else torch.float32
    seed_all(0)
    modules = [(torch.nn.Conv2d(c, c, 1, bias=False), BatchNormAct2d(c)) for _ in range(2)]
    last = torch.channels_last
    steps = [(conv.to(DEVICE, dtype, memory_format=last), bn.to(DEVICE)) for conv, bn in modules]
    x = torch.randn(sizes).to(DEVICE, dtype, memory_format=last).requires_grad_()
    y = conv_bn_act(x, steps)
    y.sum().backward()
    return [y, x.grad]


def test_untuned_steps_are_cudnn_s(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner("off", OPS, {})
    monkeypatch.setattr(fastcnn.plan, "_planner", lambda: planner)
    if not HAS_GPU:
        monkeypatch.setattr(conv_bn_act_op, "is_planned", lambda x: True)
    step_of(*((128, 64, 56, 56) if HAS_GPU else (1, 16, 3, 4)))
    plans = planner.plans()
    assert {problem.op for problem in plans} == {FWD}
    assert {plan[:2] for plan in plans.values()} == {("cudnn", "default")}
    assert all("triton " in plan.reason for plan in plans.values())  # what it takes at least


def test_a_wrong_candidate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One whose results are wrong by a hundredth, and one that raises: both are found before anybody
    # gets their results, and the right one runs.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(fastcnn.plan.tune, "REPEATS", 1)
    right = OPS[FWD].candidates["triton"]

    def wrong(problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        y, *statistics = right.run(problem, *tensors)
        return (y * 1.01, *statistics)

    broken = {
        "cudnn": OPS[FWD].candidates["cudnn"],
        "wrong": dataclasses.replace(right, name="wrong", run=wrong),
        "raises": dataclasses.replace(right, name="raises", run=lambda *_: 1 / 0),
    }
    ops = {FWD: dataclasses.replace(OPS[FWD], candidates=broken)}
    planner = Planner(
        "tune", ops, {}, open_file=lambda device: PlanFile(tmp_path, environment_of(device))
    )
    problem = Problem(
        FWD,
        (2, 16, 5, 6),
        (32, 16, 1, 1),
        torch.float32,
        torch.device("cuda", 0) if HAS_GPU else DEVICE,
        options=("channels_last",),
    )
    with pytest.warns(UserWarning, match="refused") as warned:
        plan = planner.choose(problem)
    assert (plan.name, plan.source) == ("cudnn", "tuned")
    text = " ".join(str(w.message) for w in warned)
    assert "wrong refused: output 0: error " in text
    assert "raises refused: ZeroDivisionError" in text
    assert "wrong refused: output 0: error " in plan.reason

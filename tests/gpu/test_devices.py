"""Tensors of a GPU that is not the current one."""

import pytest
import torch
from support.device import needs_gpu
from support.gpu_calls import CALLS, assert_equal, inputs, run
from support.seeds import seed_all

import fastcnn.plan
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv_bn_act import candidates as conv_bn_act_plan
from fastcnn.plan import OPS
from fastcnn.plan.planner import Planner

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs_where_its_tensors_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A launch on the current GPU would fault or give garbage; one that changes the current GPU
    # would show in the caller's next tensor. Two GPUs of one kind compute the same bits.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found = []
    for index in (0, 1):
        late, constant = inputs(name, 1, torch.device("cuda", index))
        seed_all(0)
        results = run(name, late, constant)
        assert all(t.device.index == index for t in results)
        assert torch.cuda.current_device() == 0
        found.append([t.cpu() for t in results])
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_equal(*found)


def test_each_gpu_has_plans_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # GPUs may differ: a plan of one is none of another.
    planner = Planner("off", OPS, {})
    monkeypatch.setattr(fastcnn.plan, "_planner", lambda: planner)
    for index in (0, 1):
        device = torch.device("cuda", index)
        step = torch.nn.Conv2d(16, 16, 1, bias=False), BatchNormAct2d(16)
        x = torch.randn(2, 16, 4, 4).to(device, memory_format=torch.channels_last)
        conv_bn_act(x, [tuple(m.to(device) for m in step)])
    forward = [p for p in planner.plans() if p.op == conv_bn_act_plan.FWD]
    assert {p.device.index for p in forward} == {0, 1}

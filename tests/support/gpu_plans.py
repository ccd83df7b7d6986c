"""Convolutions by the plan that a test names, on the GPU or in Triton's interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from support.device import HAS_GPU

import fastcnn.plan
from fastcnn.ops.conv_bn_act import folded as conv2d_folded, interface as conv_bn_act
from fastcnn.plan import OPS, Problem
from fastcnn.plan.planner import Plan

if not HAS_GPU:
    from support import triton_interpreter  # noqa: F401 (mends the interpreter)


@contextmanager
def planned_by(choose: Callable[[Problem], str]) -> Iterator[None]:
    """Let convolutions run by these plans; without a GPU, Triton's in the interpreter."""

    def plan(problem: Problem, busy: str | None = None) -> Plan:
        return Plan(choose(problem), "model", "", None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastcnn.plan, "_planner", lambda: SimpleNamespace(choose=plan))
        if not HAS_GPU:
            patch.setattr(conv_bn_act, "is_planned", lambda x: True)
            patch.setattr(conv2d_folded, "is_planned", lambda x: True)
        yield


def wherever_it_can(name: str, problem: Problem) -> str:
    """This candidate, or cuDNN's for problems that it does not support."""
    able, _ = OPS[problem.op].supporting(problem)
    return name if name in able else "cudnn"

"""How the steps of a chain that is trained run on CUDA, for the planner to choose from.

    conv_bn_act_fwd    from the convolution output before the step to its own, and its statistics
        cudnn                 the activation written, cuDNN's convolution, a pass for statistics
        triton                one kernel
    conv_bn_act_bwd    from dz and its sums behind the step to those before it, and dweight
        cudnn                 passes around cuDNN's two convolutions
        triton                one kernel each
        triton_dx, triton_dw  that one by Triton, the other by cuDNN

dz is the gradient in front of an activation. The first step of a chain, and one behind a pooling,
reads an image instead. The passes and who needs which: fastcnn/ops/conv_bn_act/passes.py.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.conv_operands import Gradient, Input, Output, Sums
from fastcnn.ops.conv2d.aten import convolve
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.ops.conv_bn_act.candidate_inputs import (
    bwd_exact,
    bwd_finalize,
    bwd_tensors,
    fwd_exact,
    fwd_tensors,
)
from fastcnn.ops.conv_bn_act.passes import batch_statistics, convolution_bwd, gradient_sums, written
from fastcnn.ops.conv_bn_act.problem import (
    Sizes,
    act_of,
    act_option,
    geometry_of,
    norm_of,
    problem,
    settings_of,
    without_triton,
)
from fastcnn.ops.conv_bn_act.step import StepPlan, StepSettings
from fastcnn.plan import Candidate, Kernel, Op, Problem, choose, register

FWD, BWD = "conv_bn_act_fwd", "conv_bn_act_bwd"
_BWD_PLANS = {  # dx and dw by Triton
    "cudnn": (False, False),
    "triton": (True, True),
    "triton_dx": (True, False),
    "triton_dw": (False, True),
}


def plan_step(
    s: StepSettings,
    x: Tensor,
    sizes: Sequence[int],
    weight: Tensor,
    before: StepSettings | None,
    wants_dx: bool,
    trains: bool,
) -> StepPlan:
    """Choose how a step's convolutions run. Its input has these sizes, and x's dtype and layout.

    before: the step before it, None for the first, which wants_dx or not. trains: whether there
    will be a backward.
    """
    options = [] if before is None or before.pool is not None else [act_option("in", before.act)]
    # Statistics that processes share are a pass of their own in any plan.
    with_statistics = ["training"] if s.training and s.group is None else []
    how = problem(FWD, x, sizes, weight.shape, s.conv, *options, *with_statistics)
    by_triton = choose(how) == "triton"
    if not trains:
        return StepPlan(by_triton)
    options += ["training"] if s.training else []
    options += [] if before is not None or wants_dx else ["no_dx"]
    how = problem(BWD, x, sizes, weight.shape, s.conv, *options)
    return StepPlan(by_triton, *_BWD_PLANS[choose(how)])


def _input(problem: Problem, x: Tensor, norm: Sequence[Tensor]) -> Input:
    act = act_of(problem, "in")
    return Input(x) if act is None else Input(x, norm_of(norm), ACT_NUMBER[act])


def _fwd_cudnn(problem: Problem, x: Tensor, weight: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
    raw = convolve(written(_input(problem, x, norm)), weight, None, geometry_of(problem))
    return (raw, *batch_statistics(raw, None)) if "training" in problem.options else (raw,)


def _fwd_triton(problem: Problem, x: Tensor, weight: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
    a, training = _input(problem, x, norm), "training" in problem.options
    found = conv2d_fused(a, weight, geometry_of(problem), Output(statistics=training))
    return found if training else found[:1]


def _fwd_kernels(problem: Problem, fused: bool) -> list[Kernel]:
    size, merge = Sizes(problem), [Kernel(0)] * ("training" in problem.options)
    if fused:
        return [size.triton(), *merge]
    before = [] if act_of(problem, "in") is None else [Kernel(2 * size.x)]
    return [*before, size.cudnn(), *([Kernel(size.y), *merge] if merge else [])]


def _bwd(
    plan: str,
    problem: Problem,
    dz: Tensor,
    raw: Tensor,
    x: Tensor,
    weight: Tensor,
    *rest: Tensor,
) -> tuple[Tensor, ...]:
    s = settings_of(problem, StepPlan(False, *_BWD_PLANS[plan]))
    sums = Sums(*rest[4:6]) if s.training else None
    d, a = Gradient(dz, raw, norm_of(rest[:4]), 0, sums), _input(problem, x, rest[6:])
    want = ("no_dx" not in problem.options, True, False)
    dx, found, dweight, _ = convolution_bwd(d, a, weight, None, s, want)
    if dx is not None and found is None and a.norm is not None:
        found = gradient_sums(dx, x, a.norm, a.act)
    return tuple(t for t in (dx, dweight, *(found or ())) if t is not None)


def _bwd_kernels(problem: Problem, plan: str) -> list[Kernel]:
    size, (dx_fused, dw_fused) = Sizes(problem), _BWD_PLANS[plan]
    before, wants_dx = act_of(problem, "in") is not None, "no_dx" not in problem.options
    kernels = []
    if not (dx_fused or not wants_dx) or not dw_fused:
        kernels.append(Kernel(3 * size.y))
    raw = 0 if kernels else size.y  # read beside dz where the gradient is not written
    if dw_fused:
        kernels.append(size.triton(raw))
    else:
        kernels += [Kernel(2 * size.x)] * before + [size.cudnn()]
    if wants_dx and dx_fused:
        kernels.append(size.triton(raw + size.x * before))
    elif wants_dx:
        kernels += [size.cudnn()] + [Kernel(2 * size.x)] * before
    return kernels


def _bwd_supports(problem: Problem, plan: str) -> str | None:
    if plan == "triton_dx" and "no_dx" in problem.options:
        return "there is no dx"
    if plan == "triton_dw" and "no_dx" in problem.options:
        return "it is triton where there is no dx"
    return without_triton(problem)


def _always(_: Problem) -> None:
    return None


register(
    Op(FWD, fwd_tensors, fwd_exact, "cudnn", scale_of=(0, 0, 0)),
    Candidate("cudnn", _fwd_cudnn, _always, partial(_fwd_kernels, fused=False)),
    Candidate("triton", _fwd_triton, without_triton, partial(_fwd_kernels, fused=True)),
)
register(
    Op(BWD, bwd_tensors, bwd_exact, "cudnn"),
    *(
        Candidate(
            plan,
            partial(_bwd, plan),
            _always if plan == "cudnn" else partial(_bwd_supports, plan=plan),
            partial(_bwd_kernels, plan=plan),
            None if dx_fused else bwd_finalize,
        )
        for plan, (dx_fused, _) in _BWD_PLANS.items()
    ),
)

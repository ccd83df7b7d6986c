"""conv_bn_act on a GPU: by cuDNN and by Triton, trained and evaluated, against float64.

Convolutions amplify roundings: support/roundings.py says by how much. Without a GPU Triton's
kernels run in its interpreter; "cudnn" is then PyTorch's convolution on the CPU.
"""

import copy
import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from support.activations import ACTS
from support.chains import (
    Chain,
    Stage,
    chain,
    conv_bn,
    expected_roundings,
    pooled_grouped_and_depthwise,
    results,
    stage,
)
from support.device import DEVICE, needs_gpu, on_gpu
from support.gpu_plans import planned_by, wherever_it_can
from support.seeds import seed_all
from support.triton_interpreter import without_tf32
from torch import Tensor

pytestmark = pytest.mark.gpu
# The emulator takes seconds a chain.
slow = pytest.mark.slow
PLANS = ["cudnn", "triton"]
# The interpreter's: tests/ops/conv_bn_act/test_triton.py, at length.
BY_CUDNN = [pytest.param("cudnn", marks=slow), pytest.param("triton", marks=needs_gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    seed_all(0)
    with without_tf32():
        yield


def image(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes).to(dtype).contiguous(memory_format=torch.channels_last)


def check(
    model: Stage,
    plan: str,
    x: Tensor,
    residual: tuple[int, ...] | None = None,
) -> None:
    """Every result; convolutions in the dtype of x, batch norms in float32."""
    dtype = x.dtype
    model.convs.to(dtype)
    added = None if residual is None else image(*residual, dtype=dtype)
    # The fused one has the batch norm in its weights, which are rounded once more.
    expected = expected_roundings(model, x, added, dtype if plan == "cudnn_fused" else None)
    there = [t if t is None else t.to(DEVICE) for t in (x, added)]
    with on_gpu(), planned_by(partial(wherever_it_can, plan)):
        expected.check(results(model.to(DEVICE), *there))


@pytest.mark.parametrize(
    ("dtype", "plan", "training"),
    [(torch.float32, "cudnn", True), (torch.bfloat16, "triton", True),
     *(pytest.param(*how, True, marks=slow) for how in itertools.product(DTYPES[1:], ["cudnn"])),
     *(pytest.param(*how, False, marks=slow) for how in itertools.product(DTYPES, ["cudnn"])),
     pytest.param(torch.bfloat16, "triton", False, marks=slow),
     *(pytest.param(*how, marks=needs_gpu)
       for how in itertools.product(DTYPES[::2], ["triton"], [True, False]))],
)  # fmt: skip
def test_a_chain(dtype: torch.dtype, plan: str, training: bool) -> None:
    for residual in (None, (2, 24, 3, 4)):
        check(chain(bias=False).train(training), plan, image(2, 16, 6, 7, dtype=dtype), residual)


@pytest.mark.parametrize(
    ("memory", "plan"),
    [
        *(pytest.param(memory, "cudnn", marks=slow) for memory in ("default", "low")),
        ("lowest", "cudnn"),
        ("lowest", "triton"),
        *(pytest.param(memory, "triton", marks=needs_gpu) for memory in ("default", "low")),
    ],
)
def test_bottlenecks_at_each_memory_level(memory: str, plan: str) -> None:
    for shortcuts in (("projection", "identity"), ("two steps", "none")):
        check(stage(*shortcuts, act="silu", memory=memory), plan, image(2, 4, 6, 7))


@pytest.mark.parametrize("plan", BY_CUDNN)
def test_pooling_grouped_and_depthwise(plan: str) -> None:
    model, x = pooled_grouped_and_depthwise()
    check(model, plan, x)


@pytest.mark.parametrize(
    ("act", "plan"),
    [
        ("relu", "cudnn"),
        ("relu", "cudnn_fused"),
        *(pytest.param(act, "cudnn", marks=slow) for act in ACTS if act != "relu"),
        *(pytest.param(act, "triton", marks=needs_gpu) for act in ("relu", "silu")),
    ],
)
def test_inference(act: str, plan: str) -> None:
    # Its fused one is for halves, of whole vectors of channels.
    dtype = torch.float16 if plan == "cudnn_fused" else torch.float32
    with torch.no_grad():
        for residual in (None, (2, 24, 3, 4)):
            check(chain(act).eval(), plan, image(2, 16, 6, 7, dtype=dtype), residual)
        if plan != "cudnn_fused":  # the projection has no activation
            blocks = "projection", "identity"
            check(stage(*blocks, act=act).eval(), plan, image(2, 4, 6, 7))


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_twice_and_at_each_memory_level(plan: str) -> None:
    # What is recomputed is what was not saved. "cudnn" in PyTorch's deterministic mode.
    x, found = image(2, 4, 6, 7).to(DEVICE), []
    model = stage("projection", "identity", act="silu").to(DEVICE)
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for level in ("default", "default", "low", "lowest"):
            again = copy.deepcopy(model)
            again.memory = level
            with on_gpu(), planned_by(partial(wherever_it_can, plan)):
                found.append(results(again, x, None))
    finally:
        torch.backends.cudnn.deterministic = deterministic
    for name, want in found[0].items():
        assert (want is None) or all(torch.equal(f[name], want) for f in found[1:]), name


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_in_any_layout_and_an_empty_batch(plan: str) -> None:
    # A sum's gradient has strides of 0; another consumer's may be NCHW.
    model, x = chain().to(DEVICE), image(2, 16, 6, 7).to(DEVICE).requires_grad_()
    weights = list(model.parameters())
    ones = torch.ones(2, 24, 3, 4, device=DEVICE)
    dys = [ones.expand(2, 24, 3, 4), ones.contiguous(memory_format=torch.channels_last)]
    dys.append(torch.ones((), device=DEVICE).expand(2, 24, 3, 4))
    with on_gpu(), planned_by(partial(wherever_it_can, plan)):
        first, *others = (torch.autograd.grad(copy.deepcopy(model)(x), x, dy) for dy in dys)
        assert all(torch.equal(other[0], first[0]) for other in others)
        y = model.eval()(x[:0])
        y.sum().backward()
    assert y.shape == (0, 24, 3, 4)
    assert all(not w.grad.any() for w in weights)


@needs_gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_resnet50_s_bottlenecks(dtype: torch.dtype, plan: str) -> None:
    for c_in, c, side, stride in ((256, 64, 56, 1), (256, 128, 56, 2), (2048, 512, 7, 1)):
        steps = [conv_bn(c_in, c, 1, "silu"), conv_bn(c, c, 3, "silu", stride)]
        model = Chain(*steps, conv_bn(c, 4 * c, 1, "silu"))
        out = 2, 4 * c, side // stride, side // stride
        check(model, plan, image(2, c_in, side, side, dtype=dtype), out)


def test_what_was_called() -> None:
    # Led to Triton's kernels and to the CUDA ones: neither falls back.
    x = image(2, 16, 6, 7).to(DEVICE)
    for plan, expected in (
        ("triton", {"conv2d_fused", "batch_norm_act_apply"}),
        ("cudnn", {"batch_norm_act_fwd", "batch_norm_act_bwd"}),
    ):
        with on_gpu() as called, planned_by(partial(wherever_it_can, plan)):
            results(chain().to(DEVICE), x, None)
        assert expected <= set(called.operators), plan
    names = {"conv2d_fused", "aten.convolution.default"}
    assert names & {*called.operators, *called.others} == {"aten.convolution.default"}

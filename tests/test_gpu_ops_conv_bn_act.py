"""conv_bn_act on the card: by cuDNN and by Triton, trained and evaluated, beside eager in float64.

Convolutions amplify roundings, so that several draws tell (tolerance.py); the yardstick is eager
PyTorch in the dtype on the same device. Without a card Triton's kernels run in its interpreter,
where draws are few and the same every time; "cudnn" is then PyTorch's convolution on the CPU.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from activations import ACTS
from card import DEVICE, HAS_CARD, needs_a_card, on_card
from card_plans import planned_by, wherever_it_can
from chains import Chain, Stage, conv_bn, results, stage, twin
from seeds import seed_all
from test_conv_bn_act_fused import chain
from tolerance import assert_as_exact_over_draws, error_ratio
from torch import Tensor, nn
from triton_proof import without_tf32

from fastcnn.nn import BatchNormAct2d

pytestmark = pytest.mark.gpu
# Of a gradient of few numbers the ratio to PyTorch's error deviates by a factor of 1.6 from draw to
# draw: 16 draws, so that 2 is five deviations of their mean away. One result of all pixels, by 1.2.
DRAWS, DRAWS_FORWARD = (16, 4) if HAS_CARD else (6, 4)
INTERPRETED_DRAWS = 2
PLANS = ["cudnn", "triton"]
# What test_conv_bn_act_fused.py asks the interpreter, at length.
BY_CUDNN = ["cudnn", pytest.param("triton", marks=needs_a_card)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    seed_all(0)
    with without_tf32():
        yield


def image(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes).to(dtype).contiguous(memory_format=torch.channels_last)


def moved(t: Tensor | None, to: torch.device | torch.dtype) -> Tensor | None:
    return None if t is None else t.to(to)


def check(
    make: Callable[[], Stage],
    plan: str,
    sizes: tuple[int, ...],
    residual: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    draws: int = DRAWS,
) -> None:
    """Every result of several draws; convolutions in the dtype, batch norms in float32."""
    if plan == "triton" and not HAS_CARD:
        draws = INTERPRETED_DRAWS
    ratios: dict[str, list[float]] = {}
    for i in range(draws):
        model, x = make(), image(*sizes, dtype=dtype)
        model.convs.to(dtype)
        added = None if residual is None else image(*residual, dtype=dtype)
        exact = results(twin(model).double(), x.double(), moved(added, torch.float64), seed=i)
        here = x.to(DEVICE), moved(added, DEVICE)
        eager = results(twin(model).to(DEVICE), *here, seed=i)
        with on_card(), planned_by(partial(wherever_it_can, plan)):
            found = results(model.to(DEVICE), *here, seed=i)
        assert found.keys() == exact.keys()
        for name, want in exact.items():
            got, theirs = moved(found[name], torch.device("cpu")), eager[name]
            assert (got is None) == (want is None), name
            if got is None or theirs is None or want is None:
                continue
            if want.dtype.is_floating_point:
                ratios.setdefault(name, []).append(error_ratio(got, theirs.cpu(), want))
            else:
                assert torch.equal(got, want), name
    assert ratios
    for name, of_draws in ratios.items():
        assert_as_exact_over_draws(name, of_draws)


@TRAINING
@pytest.mark.parametrize(
    ("dtype", "plan"),
    [*itertools.product(DTYPES, ["cudnn"]), (torch.bfloat16, "triton"),
     *(pytest.param(t, "triton", marks=needs_a_card) for t in (torch.float32, torch.float16))],
)  # fmt: skip
def test_a_chain(dtype: torch.dtype, plan: str, training: bool) -> None:
    for residual in (None, (2, 24, 3, 4)):
        check(lambda: chain(bias=False).train(training), plan, (2, 16, 6, 7), residual, dtype)


@pytest.mark.parametrize(
    ("memory", "plan"),
    [*itertools.product(["default", "low", "lowest"], ["cudnn"]), ("lowest", "triton"),
     *(pytest.param(memory, "triton", marks=needs_a_card) for memory in ("default", "low"))],
)  # fmt: skip
def test_bottlenecks_at_each_memory_level(memory: str, plan: str) -> None:
    for shortcuts in (("projection", "identity"), ("two steps", "none")):
        check(lambda s=shortcuts: stage(*s, act="silu", memory=memory), plan, (2, 4, 6, 7))


@pytest.mark.parametrize("plan", BY_CUDNN)
def test_pooling_grouped_and_depthwise(plan: str) -> None:
    def make() -> Stage:
        pooled = (*conv_bn(16, 8, 3, "silu"), nn.MaxPool2d(3, 2, 1))
        wide = nn.Conv2d(8, 16, 3, padding=1, groups=2), BatchNormAct2d(16, act="gelu")
        deep = nn.Conv2d(16, 32, (3, 1), padding=(1, 0), groups=16), BatchNormAct2d(32, act="silu")
        return Chain(pooled, wide, deep, conv_bn(32, 8, 1, "none"))

    check(make, plan, (2, 16, 6, 7))


@pytest.mark.parametrize(
    ("act", "plan"),
    [*itertools.product(ACTS, ["cudnn"]),
     ("relu", "cudnn_fused"),
     *(pytest.param(act, "triton", marks=needs_a_card) for act in ("relu", "silu"))],
)  # fmt: skip
def test_inference(act: str, plan: str) -> None:
    # Its fused one is for halves, of whole vectors of channels.
    dtype = torch.float16 if plan == "cudnn_fused" else torch.float32
    with torch.no_grad():
        for residual in (None, (2, 24, 3, 4)):
            check(lambda: chain(act).eval(), plan, (2, 16, 6, 7), residual, dtype, DRAWS_FORWARD)
        if plan != "cudnn_fused":  # the projection has no activation
            blocks = "projection", "identity"
            check(lambda: stage(*blocks, act=act).eval(), plan, (2, 4, 6, 7), draws=DRAWS_FORWARD)


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_twice_and_at_each_memory_level(plan: str) -> None:
    # What is rebuilt is what was not kept. "cudnn" in the deterministic way that PyTorch asks for.
    x, found = image(2, 4, 6, 7).to(DEVICE), []
    model = stage("projection", "identity", act="silu").to(DEVICE)
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for level in ("default", "default", "low", "lowest"):
            again = copy.deepcopy(model)
            again.memory = level
            with on_card(), planned_by(partial(wherever_it_can, plan)):
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
    with on_card(), planned_by(partial(wherever_it_can, plan)):
        first, *others = (torch.autograd.grad(copy.deepcopy(model)(x), x, dy) for dy in dys)
        assert all(torch.equal(other[0], first[0]) for other in others)
        y = model.eval()(x[:0])
        y.sum().backward()
    assert y.shape == (0, 24, 3, 4)
    assert all(not w.grad.any() for w in weights)


@needs_a_card
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_resnet50_s_bottlenecks(dtype: torch.dtype, plan: str) -> None:
    for c_in, c, side, stride in ((256, 64, 56, 1), (256, 128, 56, 2), (2048, 512, 7, 1)):

        def make(c_in: int = c_in, c: int = c, stride: int = stride) -> Stage:
            steps = [conv_bn(c_in, c, 1, "silu"), conv_bn(c, c, 3, "silu", stride)]
            return Chain(*steps, conv_bn(c, 4 * c, 1, "silu"))

        out = 2, 4 * c, side // stride, side // stride
        check(make, plan, (2, c_in, side, side), out, dtype, draws=3)


def test_what_was_called() -> None:
    # Led to Triton's kernels and to the CUDA ones: neither falls back.
    x = image(2, 16, 6, 7).to(DEVICE)
    for plan, expected in (
        ("triton", {"conv2d_fused", "conv2d_fused_bwd_input", "conv2d_fused_bwd_weight"}),
        ("cudnn", {"batch_norm_act_fwd", "batch_norm_act_bwd"}),
    ):
        with on_card() as called, planned_by(partial(wherever_it_can, plan)):
            results(chain().to(DEVICE), x, None)
        assert expected <= set(called.operators), plan
    names = {"conv2d_fused", "aten.convolution.default"}
    assert names & {*called.operators, *called.others} == {"aten.convolution.default"}

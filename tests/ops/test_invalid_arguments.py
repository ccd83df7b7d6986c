"""torch.ops.fastcnn called directly with invalid arguments raises, and never reads elsewhere.

Every argument of every operator is replaced by everything that could lead a kernel astray, one at a
time and several at once.
"""

import itertools
import random
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import DEVICE, cuda_operators, on_gpu
from support.invalid_arguments import ANY, CHANNELS, IMAGE, IMAGES, STORAGE, numbers, spoiled
from support.operator_arguments import OPERATORS, PYTORCHS_OWN, good_arguments
from support.shapes import LAYOUTS
from torch import Tensor

SAME_NUMBER = ("expanded", "huge strides", "shorter", "strided")  # of a vector of one
# One int64 in any shape and with any strides is a seed.
SEED = ["None", "no tensor", "a number", "bool", "complex", "other float", "another half", "meta"]
SEED += ["sparse", "empty", "longer", "storage freed", "storage freed behind an offset"]
SEED += ["storage halved", "storage without its last byte"]
OPTIONAL = ("residual", "saved", "weight", "bias", "skip", "add")  # total is None already
OPTIONAL += ("bias1", "bias2", "expand_bias", "project_bias")
OPTIONAL += ("bn_weight", "bn_bias")
ALONE = {"other float", "another half", "meta", "empty", "shorter", "longer"}
ALONE |= {"channel less", "column less", "the other layout"}
SOUND_STRIDES = {"expanded", "huge strides", "strided"}
# Where no second tensor says how many channels or images there are, or which dtype.
VALID_HERE = {
    ("group_norm_act_fwd", "x"): ALONE - {"other float", "meta", "channel less"},
    ("pixel_norm_act_fwd", "x"): ALONE - {"other float", "meta", "channel less"},
    ("batch_norm_act_stats", "x"): ALONE,
    ("batch_norm_join_stats", "gathered"): ALONE,
    ("depthwise_conv2d_fwd", "x"): ALONE - {"other float", "meta", "channel less"},
    ("depthwise_conv2d_bwd_data", "dy"): ALONE
    - {"other float", "meta", "channel less", "column less", "the other layout"},
    ("conv2d_bwd_weight", "dy"): {"channel less"},
    ("conv2d_bwd_weight", "x"): {"channel less"},
    # Read by PyTorch's own operators, with any strides.
    **{("conv2d_int8", key): SOUND_STRIDES for key in ("weight", "weight_scale", "bias")},
    # A batch norm's numbers are of any type below float64, each, and made dense.
    **{
        ("conv2d_fused", f"bn_{key}"): SOUND_STRIDES | {"another half"}
        for key in ("mean", "var", "weight", "bias")
    },
    # A weight is copied into channels_last.
    ("conv2d_fused", "weight"): SOUND_STRIDES | {"the other layout"},
    **{("conv2d_winograd_bwd_weight", key): {"channel less"} for key in ("dy", "x")},
    ("conv2d_winograd_fwd", "u"): SOUND_STRIDES,  # PyTorch's product reads it
    ("pointwise_conv2d_fwd", "x"): ALONE
    - {"other float", "meta", "channel less", "the other layout"},
    ("inverted_residual_fwd", "x"): ALONE
    - {"other float", "meta", "channel less", "the other layout"},
    ("squeeze_excite_fwd", "x"): ALONE - {"other float", "meta", "channel less"},
    ("upsample_fwd", "x"): {"channel less"},
    ("upsample_fwd", "skip"): {"channel less"},
    ("upsample_bwd", "dy"): ALONE - {"column less", "the other layout"},
    ("upsample_taps_fwd", "z"): ALONE - {"channel less", "column less", "the other layout"},
    ("upsample_taps_bwd", "dy"): ALONE - {"column less", "the other layout"},
}


HOW = [
    (dtype, layout)
    for layout in LAYOUTS
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
]
FEW = [(torch.bfloat16, "channels_last")]


def accepted_invalid_arguments(
    log: Path, gpu: bool, how: list[tuple[torch.dtype, str]]
) -> tuple[int, list[str]]:
    """Call the operators with invalid arguments; how often, and which calls did not raise."""
    accepted, calls = [], 0
    around, device = (on_gpu, DEVICE) if gpu else (nullcontext, torch.device("cpu"))
    generator = random.Random(0)

    def attempt(op: str, dtype: torch.dtype, layout: str, bad: list[tuple[str, str]]) -> None:
        nonlocal calls
        arguments = good(op, dtype, layout)
        for name, kind in bad:
            spoil = (ANY | IMAGE | CHANNELS).get(kind)
            given = arguments[name]
            arguments[name] = (
                numbers(op, name)[int(kind)] if spoil is None else spoiled(given, spoil)
            )
        case = f"{op} {dtype} {layout} {bad}"
        log.write_text(case)
        calls += 1
        try:
            getattr(torch.ops.fastcnn, op)(*arguments.values())
            accepted.append(case)
        except Exception:
            pass
        synchronize()

    def good(op: str, dtype: torch.dtype, layout: str) -> dict[str, Any]:
        arguments = good_arguments(op, dtype, layout)
        return {k: t.to(device) if isinstance(t, Tensor) else t for k, t in arguments.items()}

    def synchronize() -> None:
        """Raise here what a kernel did wrong: every later call would raise, and seem right."""
        if device.type == "cuda":
            torch.cuda.synchronize()

    ops = [op for op in OPERATORS if not gpu or op in cuda_operators()]
    for op, (dtype, layout) in itertools.product(ops, how):
        with around():
            getattr(torch.ops.fastcnn, op)(*good(op, dtype, layout).values())
            synchronize()
            choices = [
                (name, kind)
                for name, given in good(op, dtype, layout).items()
                for kind in kinds(op, name, given)
            ]
            for choice in choices:
                attempt(op, dtype, layout, [choice])
            # Several at once: one check must not lead another astray. Different kinds, since x and
            # residual in the other layout are valid.
            for _ in range(30):
                bad = {kind: name for name, kind in generator.sample(choices, 3)}
                attempt(op, dtype, layout, list({v: k for k, v in bad.items()}.items()))
    return calls, accepted


def kinds(op: str, name: str, good: Any) -> list[str]:
    if isinstance(good, list) and isinstance(good[0], Tensor):
        good = good[-1]
    if not isinstance(good, Tensor):
        return [str(i) for i in range(len(numbers(op, name)))]
    if name == "seed":
        return [*SEED, *(["on the CPU"] if good.is_cuda else [])]
    own = ANY | (IMAGE if name in IMAGES else CHANNELS)
    legal = VALID_HERE.get((op, name), set()) | ({"None"} if name in OPTIONAL else set())
    if good.device.type == "cpu" or "meta" in legal:
        legal = legal | {"on the CPU"}
    if good.numel() == 1:
        legal = legal | set(SAME_NUMBER)
    if good.dtype is torch.int64:
        legal = legal | {"int64"}
    return [kind for kind in own if kind not in legal]


def test_every_operator_is_here() -> None:
    # One that is registered later and not named above would go without invalid arguments unnoticed.
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("fastcnn::")}
    # conv2d_bwd_weight is not on all machines.
    assert registered - set(OPERATORS) <= {*PYTORCHS_OWN, "conv2d_bwd_weight"}
    assert set(OPERATORS) <= registered


@pytest.mark.parametrize(
    ("gpu", "how"),
    [
        pytest.param(False, FEW, id="cpu"),
        pytest.param(True, FEW, id="gpu", marks=pytest.mark.gpu),
        pytest.param(False, HOW, id="cpu, every dtype in both layouts", marks=pytest.mark.slow),
        pytest.param(True, HOW[:1], id="GPU, float32", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)
def test_invalid_arguments_raise(
    gpu: bool, how: list[tuple[torch.dtype, str]], tmp_path: Path
) -> None:
    # In a process of its own, so that a crash is a failure that names the call; and on a GPU, so
    # that a kernel that went wrong spoils no other test.
    log = tmp_path / "call"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            calls, accepted = pool.submit(
                partial(accepted_invalid_arguments, log, gpu, how)
            ).result()
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}: in {log.read_text()}")
    assert calls > 1000
    assert not accepted, f"{len(accepted)} of {calls} calls did not raise:\n" + "\n".join(accepted)


IN_PYTHON = ["conv2d_relu", "conv2d_int8", *(op for op in OPERATORS if "fused" in op)]


@pytest.mark.parametrize("op", IN_PYTHON)
def test_operators_in_python_name_a_tensor_that_is_none(op: str) -> None:
    good = good_arguments(op, torch.float32, "nchw")
    schema = getattr(torch.ops.fastcnn, op).default._schema
    required = [a.name for a in schema.arguments if str(a.type) == "Tensor"]
    assert len(required) >= 2
    for name in required:
        with pytest.raises(RuntimeError, match=f"{op}: {name}: expected a tensor, got None"):
            getattr(torch.ops.fastcnn, op)(*{**good, name: None}.values())


@pytest.mark.parametrize("op", PYTORCHS_OWN)
@pytest.mark.parametrize("kind", STORAGE)
def test_pytorch_s_own_operators_ask_for_storage(op: str, kind: str) -> None:
    # PyTorch's kernels do not: they end the process, where the next page cannot be read.
    good = good_arguments(op, torch.float32, "nchw")
    run = getattr(torch.ops.fastcnn, op)
    run(*good.values())
    for name, t in good.items():
        if isinstance(t, Tensor):
            with pytest.raises(ValueError, match=f"{op}: {name}: expected a storage of at least"):
                run(*{**good, name: STORAGE[kind](t)}.values())


# What is the CPU's alone is not asked; augment takes a number for its dtype.
BY_DTYPE = ("batch_norm", "group_norm", "pixel_norm", "dropout", "upsample_fwd", "upsample_bwd")
REFUSED = [op for op in OPERATORS if op.startswith(BY_DTYPE) and "concat" not in op]


@pytest.mark.gpu
@pytest.mark.parametrize("op", REFUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_refused_on_cuda(op: str, layout: str) -> None:
    # No kernel is made for it; the public functions say so in the user's words (gpu/test_norms.py).
    good = good_arguments(op, torch.float64, layout)
    arguments = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in good.values()]
    with on_gpu(), pytest.raises(RuntimeError, match=r"fastcnn::.*: invalid argument"):
        getattr(torch.ops.fastcnn, op)(*arguments)

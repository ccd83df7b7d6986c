"""torch.ops.fastcnn called directly with invalid arguments raises, and never reads elsewhere.

Every argument of every operator is replaced by everything that could lead a kernel astray, one at a
time and several at once.
"""

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import DEVICE, cuda_operators, on_gpu
from support.operator_arguments import OPERATORS, good_arguments
from support.shapes import LAYOUTS
from torch import Tensor


def without_storage(t: Tensor, kept: float, offset: int = 0) -> Tensor:
    """t's sizes and strides over a storage that has shrunk since."""
    storage = torch.cat([t.new_zeros(offset), t.flatten()]).untyped_storage()
    view = t.new_empty(0).set_(storage, offset, t.shape, t.stride())
    storage.resize_(int(storage.nbytes() * kept))
    return view


ANY: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "no tensor": lambda t: "x",
    "a number": lambda t: 1.0,
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "other float": lambda t: t.half() if t.dtype == torch.float64 else t.double(),
    "another half": lambda t: t.half() if t.dtype == torch.bfloat16 else t.bfloat16(),
    "meta": lambda t: t.to("meta"),
    "on the CPU": lambda t: t.cpu(),
    "sparse": lambda t: t.to_sparse(),
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "huge strides": lambda t: t.new_zeros(t.numel() * 64).as_strided(
        t.shape, [64 * s for s in t.stride()]
    ),
    "empty": lambda t: t[:0],
    "shorter": lambda t: t[:1],
    "longer": lambda t: torch.cat([t, t]),
    "another dimension": lambda t: t[None],
    "a dimension less": lambda t: t[0],
    "no dimension": lambda t: t.flatten()[0],
    "storage freed": lambda t: without_storage(t, 0),
    "storage freed behind an offset": lambda t: without_storage(t, 0, 5),
    "storage halved": lambda t: without_storage(t, 0.5),
}
IMAGE: dict[str, Callable[[Tensor], Any]] = {
    "overlapping": lambda t: t.as_strided(t.shape, (1, 1, 1, 1)),
    "channel less": lambda t: t[:, 1:].clone(),
    "column less": lambda t: t[..., 1:].clone(),
    "transposed": lambda t: t.mT,
    "permuted": lambda t: t.permute(0, 2, 1, 3),
    "the other layout": lambda t: t.contiguous(
        memory_format=LAYOUTS["channels_last" if t.is_contiguous() else "nchw"]
    ),
}
CHANNELS: dict[str, Callable[[Tensor], Any]] = {"strided": lambda t: t.repeat_interleave(2)[::2]}
NUMBERS: dict[str, list[Any]] = {
    "act": [-1, 8, 2**31, -(2**63), 2**63 - 1, None, "relu"],
    "count": [1, 0, -5, -(2**63), None, "x"],  # without a total
    **{key: [None, "x"] for key in ("eps", "in_eps", "out_eps")},
    **{key: [-1, 8, 2**31, 2**62, None, "x"] for key in ("in_act", "out_act")},
    "groups": [0, -1, 4, 7, 2**62, -(2**63), None, "x"],
    "momentum": [None, "x"],
    "total": [torch.ones(2), torch.ones(()), torch.ones(1, dtype=torch.int64), "x"],
    "p": [-0.1, 1.1, float("nan"), float("inf"), None, "x"],
    "h": [0, -1, 3, 2**31, 2**62, None, "x"],
    "w": [0, -1, 3, 2**31, 2**62, None, "x"],
    "scale_h": [0.0, -1.0, 0.3, float("nan"), float("inf"), "x"],
    "scale_w": [0.0, -2.0, 2.6, float("nan"), float("inf"), "x"],
    "sampling": [-1, 4, 2**40, None, "x"],
    **{
        key: [0, -1, 2, 2**21, 2**62, None, "x"]
        for key in ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w")
    },
    **{key: [-1, 2, 2**21, 2**62, None, "x"] for key in ("padding_h", "padding_w")},
    **{
        key: [0.0, -1.0, float("nan"), float("inf"), "x"] for key in ("out_scale", "residual_scale")
    },
    "x_scale": [0.0, -1.0, float("nan"), float("inf"), None, "x"],
    **{key: [-1, 256, 2**62, None, "x"] for key in ("x_zero_point", "out_zero_point")},
    **{key: [-1, 256, 2**62, None, "x"] for key in ("residual_zero_point", "zero_point")},
    "cap": [0.0, -1.0, float("nan"), None, "x"],
    "out_dtype": [torch.int32, torch.float64, None, "x"],
    **{key: [[0, 1], [1], [2**40, 1], None, "x"] for key in ("stride", "dilation")},
    "padding": [[-1, 1], [1], [2**40, 1], None, "x"],
    "channels_last": ["x"],  # None is False to the dispatcher
}
# Of one operator's, where others see sense in these.
NUMBERS_OF: dict[tuple[str, str], list[Any]] = {
    **{
        (op, size): [0, -1, 2**62, None, "x"] for op in ("augment", "augment_mask") for size in "hw"
    },
    ("augment", "dtype"): [-1, 3, 2**31, None, "x"],
    ("augment_mask", "fill"): [None],
    ("conv2d_int8_epilogue", "residual_scale"): [0.0, -1.0, float("nan"), None, "x"],
}
SAME_NUMBER = ("expanded", "huge strides", "shorter", "strided")  # of a vector of one
# One int64 in any shape and with any strides is a seed.
SEED = ["None", "no tensor", "a number", "bool", "complex", "other float", "another half", "meta"]
SEED += ["sparse", "empty", "longer", "storage freed", "storage freed behind an offset"]
SEED += ["storage halved"]
OPTIONAL = ("residual", "saved", "weight", "bias", "skip", "add")  # total is None already
OPTIONAL += ("in_weight", "in_bias", "out_weight", "out_bias")
IMAGES = ("x", "z", "residual", "saved", "dy", "skip", "y", "acc", "add", "in_raw", "out_raw")
ALONE = {"other float", "another half", "meta", "empty", "shorter", "longer"}
ALONE |= {"channel less", "column less", "the other layout"}
SOUND_STRIDES = {"expanded", "huge strides", "strided"}
# Where no second tensor says how many channels or images there are, or which dtype.
VALID_HERE = {
    ("group_norm_act_fwd", "x"): ALONE - {"other float", "meta", "channel less"},
    ("pixel_norm_act_fwd", "x"): ALONE - {"other float", "meta", "channel less"},
    ("batch_norm_act_stats", "x"): ALONE,
    ("batch_norm_join_stats", "gathered"): ALONE,
    ("conv2d_bwd_weight", "dy"): {"channel less"},
    ("conv2d_bwd_weight", "x"): {"channel less"},
    # Read by PyTorch's own operators, with any strides.
    **{("conv2d_int8", key): SOUND_STRIDES for key in ("weight", "weight_scale", "bias")},
    # A batch norm's numbers are of any type below float64, each, and made dense.
    **{
        (op, f"{side}_{key}"): SOUND_STRIDES | {"another half"}
        for op in ("conv2d_fused", "conv2d_fused_bwd_input", "conv2d_fused_bwd_weight")
        for side in ("in", "out")
        for key in ("mean", "var", "weight", "bias")
    },
    **{
        (f"conv2d_fused_bwd_{of}", key): {"another half"}
        for of in ("input", "weight")
        for key in ("sum", "sum_xhat")
    },
    # A weight is copied into channels_last.
    **{
        (op, "weight"): SOUND_STRIDES | {"the other layout"}
        for op in ("conv2d_fused", "conv2d_fused_bwd_input")
    },
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
            arguments[name] = numbers(op, name)[int(kind)] if spoil is None else spoil(given)
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


def numbers(op: str, name: str) -> list[Any]:
    return NUMBERS_OF.get((op, name), NUMBERS.get(name, []))


def kinds(op: str, name: str, good: Any) -> list[str]:
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
    # clone_no_cse and conv2d_relu are PyTorch's own; conv2d_bwd_weight is not on all machines.
    assert registered - set(OPERATORS) <= {"clone_no_cse", "conv2d_relu", "conv2d_bwd_weight"}
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


# upsample_taps_fwd and _bwd are the CPU's alone; augment takes a number for its dtype.
BY_DTYPE = ("batch_norm", "group_norm", "pixel_norm", "dropout", "upsample_fwd", "upsample_bwd")


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in OPERATORS if op.startswith(BY_DTYPE)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_refused_on_cuda(op: str, layout: str) -> None:
    # No kernel is made for it; the public functions say so in the user's words (gpu/test_norms.py).
    good = good_arguments(op, torch.float64, layout)
    arguments = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in good.values()]
    with on_gpu(), pytest.raises(RuntimeError, match=r"fastcnn::.*: invalid argument"):
        getattr(torch.ops.fastcnn, op)(*arguments)

"""conv2d_int8 as it is called: packed weights, layouts, batches, threads."""

import collections
import copy
import gc
import math
import pickle
from typing import Any

import pytest
import torch
from support.conv2d_int8_cases import CASES, PLAIN, Case, problem
from support.shapes import LAYOUTS, RESNET50_CONVS, Conv
from support.small_models import Int8
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn import reference
from fastcnn.functional import PackedConv2dInt8, conv2d_int8, pack_conv2d_int8
from fastcnn.models import resnet50
from fastcnn.ops.conv2d import winograd
from fastcnn.ops.conv2d_int8 import (
    onednn as conv2d_int8_sums,
    packed_weight as conv2d_int8_pack,
    value_checks as conv2d_int8_data,
)

WIDE = Case((1, 1100, 3, 3), 5, 3, "high and low", padding=1)


@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=str)
def test_packed_weights(case: Case) -> None:
    for seed in range(3):
        given = problem(case, torch.uint8, torch.int8, torch.uint8, "relu", seed)
        expected = conv2d_int8(**given)
        packed = pack_conv2d_int8(given["weight"])
        given["weight"].zero_()  # it is a copy
        given["weight"] = packed
        for _ in range(2):
            assert torch.equal(conv2d_int8(**given), expected)


def test_packed_weights_are_prepared_once_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where sums of two products saturate (before VNNI), a weight is packed as two parts.
    parts = 2 if conv2d_int8_sums.pairs_saturate() else 1
    calls = []
    prepack = conv2d_int8_sums._prepack
    monkeypatch.setattr(
        conv2d_int8_sums, "_prepack", lambda *args: calls.append(args) or prepack(*args)
    )
    packed = pack_conv2d_int8(problem(PLAIN)["weight"])
    given = {**problem(PLAIN), "weight": packed}
    for _ in range(3):
        conv2d_int8(**given)
    assert len(calls) == parts
    conv2d_int8(**{**given, "x": given["x"][:1], "x_zero_point": 3})
    assert len(calls) == parts
    for stride in range(1, 11):
        conv2d_int8(**{**given, "stride": stride})
    assert repr(packed) == "PackedConv2dInt8(24x16x3x3, packed for 8 inputs)"
    given["weight"].weight[0] = 1  # nobody should, but then it holds
    expected = reference.conv2d_int8(**{**given, "weight": packed.weight})
    assert torch.equal(conv2d_int8(**given), expected)


def test_packed_weights_that_move_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(PLAIN)
    expected, packed = conv2d_int8(**given), pack_conv2d_int8(given["weight"])
    given["weight"] = packed
    assert torch.equal(conv2d_int8(**given), expected)
    packed.weight.share_memory_()  # as a queue of torch.multiprocessing does
    for _ in range(2):
        assert torch.equal(conv2d_int8(**given), expected)
        monkeypatch.setattr(conv2d_int8_sums, "_prepack", None)  # packed once more, and no more


def pickled(packed: PackedConv2dInt8) -> Any:
    return pickle.loads(pickle.dumps(packed))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
def test_copies_of_packed_weights(duplicate: Any) -> None:
    given = problem(PLAIN)
    expected, packed = conv2d_int8(**given), pack_conv2d_int8(given["weight"])
    conv2d_int8(**{**given, "weight": packed})
    again = duplicate(packed)
    assert repr(again) == "PackedConv2dInt8(24x16x3x3, packed for 0 inputs)"
    assert torch.equal(conv2d_int8(**{**given, "weight": again}), expected)
    again.weight.zero_()
    assert torch.equal(conv2d_int8(**{**given, "weight": packed}), expected)


def test_a_packed_weight_whose_memory_is_another() -> None:
    given = problem(PLAIN)
    packed = pack_conv2d_int8(given["weight"])
    old = packed.weight.data
    conv2d_int8(**{**given, "weight": packed})
    packed.weight.data = given["weight"].flip(0).contiguous(memory_format=torch.channels_last)
    for weight in (packed, old, old.mT):  # the address of `old` is known, and not its weight's
        plain = packed.weight if weight is packed else weight
        expected = reference.conv2d_int8(**{**given, "weight": plain})
        assert torch.equal(conv2d_int8(**{**given, "weight": weight}), expected)
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert (moved.weight.device.type, moved.sums().shape) == ("meta", (24,))


def test_data_is_looked_at_once_a_tensor_also_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, look = [], conv2d_int8_data._look
    monkeypatch.setattr(conv2d_int8_data, "_look", lambda *args: looks.append(0) or look(*args))
    network, x = Int8(), problem(PLAIN)["x"]
    run = torch.compile(network, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        network(x)
        run(x)
    assert len(looks) == 1  # the second convolution's scale is a number
    with torch.inference_mode():
        network.scale.mul_(2)
    network(x)
    assert len(looks) == 2
    conv2d_int8_data._KNOWN.clear()
    for _ in range(3):
        network.scale = network.scale.clone()
        network(x)
    assert len(looks) == 5
    assert len(conv2d_int8_data._KNOWN) == 1  # nothing is kept of what is gone


def test_nothing_is_left_of_packed_weights() -> None:
    given = problem(PLAIN)
    gc.collect()
    before = len(conv2d_int8_pack._PACKED)
    with torch.inference_mode():
        packed = pack_conv2d_int8(given["weight"])
        conv2d_int8(**{**given, "weight": packed})
    assert len(conv2d_int8_pack._PACKED) == before + 1
    del packed
    assert len(conv2d_int8_pack._PACKED) == before


@pytest.mark.parametrize("residual_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(case: Case, residual_dtype: torch.dtype | None) -> None:
    given = problem(case, torch.int8, torch.uint8, residual_dtype)
    expected = conv2d_int8(**given)
    for name in ("x", "residual"):
        if name in given:
            given[name] = given[name].clone(memory_format=torch.contiguous_format)
    y = conv2d_int8(**given)
    assert torch.equal(y, expected)
    assert y.is_contiguous()
    assert expected.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_a_batch_and_an_empty_one(layout: str) -> None:
    given = problem(PLAIN._replace(sizes=(5, 16, 7, 6)), residual_dtype=torch.uint8)
    for name in ("x", "residual"):
        given[name] = given[name].contiguous(memory_format=LAYOUTS[layout])
    whole = conv2d_int8(**given)
    for part in (slice(2, 4), slice(4, 5), slice(3, 3)):
        some = {name: given[name][part] for name in ("x", "residual")}
        y = conv2d_int8(**{**given, **some})
        assert torch.equal(y, whole[part])
        assert y.shape == (len(range(*part.indices(5))), 24, 7, 6)


def test_the_same_bits_on_any_number_of_threads_and_in_any_batch() -> None:
    # 40 MB of sums: several images at a time.
    case = Case((13, 8, 56, 56), 256, 1, "several chunks of the batch")
    given, threads = problem(case, residual_dtype=torch.int8, act="relu6"), torch.get_num_threads()
    expected = reference.conv2d_int8(**given)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(conv2d_int8(**given), expected)
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_of_a_float_residual() -> None:
    given = problem(PLAIN, out_dtype=torch.float32, residual_dtype=torch.float32, act="relu6")
    values = [float("nan"), float("inf"), -float("inf")]
    given["residual"][0, :3, 0, 0] = torch.tensor(values)
    y = conv2d_int8(**given)
    assert y[0, 0, 0, 0].isnan()
    assert y[0, 1:3, 0, 0].tolist() == [6.0, 0.0]
    assert torch.equal(y.nan_to_num(7), reference.conv2d_int8(**given).nan_to_num(7))


def test_the_benchmarks_convolutions_are_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    found: collections.Counter[Conv] = collections.Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if op is torch.ops.aten.convolution.default:
                x, weight, _, stride, *_ = args
                c_out, c_in, kernel, _ = weight.shape
                found[Conv(c_in, c_out, kernel, stride[0], x.shape[2], 0)] += 1
            return op(*args, **(kwargs or {}))

    monkeypatch.setattr(winograd, "LEAST_GAIN", math.inf)
    with Counted():
        resnet50()(torch.randn(1, 3, 224, 224))
    assert found == {conv._replace(times=0): conv.times for conv in RESNET50_CONVS}


@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=str)
def test_a_default_device_changes_nothing(case: Case) -> None:
    given = problem(case, torch.uint8, torch.int8, torch.uint8, "relu", 0)
    given["weight_scale"] = 0.5
    expected = conv2d_int8(**given)
    conv2d_int8_sums.pairs_saturate.cache_clear()  # found out under the other default
    with torch.device("meta"):
        assert torch.equal(conv2d_int8(**given), expected)
        assert torch.equal(
            conv2d_int8(**given | {"weight": pack_conv2d_int8(given["weight"])}), expected
        )

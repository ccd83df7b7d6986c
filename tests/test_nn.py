"""BatchNormAct2d against torch.nn.BatchNorm2d, which it replaces in a network that exists."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from seeds import seeded
from tolerance import assert_as_exact_as_torch, assert_same_in_float64
from torch import Tensor, nn

from fastcnn import _C
from fastcnn.lab import kept_for_backward
from fastcnn.nn import BatchNormAct2d, convert_sync_batchnorm

KINDS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.3, "eps": 0.1},
    {"momentum": None},  # the cumulative average
    {"momentum": 0.0},  # the running statistics stay as they are, batches are counted
    {"momentum": 1.0},  # they are the last batch's
    {"affine": False},
    {"track_running_stats": False},  # evaluation then uses the batch's statistics
    {"affine": False, "track_running_stats": False, "momentum": None},  # nothing in state_dict
]
LEVELS = _C.cpu_levels.split(",")


def pair(dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[nn.BatchNorm2d, BatchNormAct2d]:
    return nn.BatchNorm2d(3, dtype=dtype, **kwargs), BatchNormAct2d(3, dtype=dtype, **kwargs)


def images(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = seeded(seed)
    return (2 * torch.randn(4, 3, 5, 7, generator=generator) + 1).to(dtype)


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    """In float64: sums of 4 * 5 * 7 values, whose squares are at most 100 here."""
    assert_same_in_float64(name, actual, expected, 140, 100.0)


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    a, e = actual.state_dict(), expected.state_dict()
    assert list(a) == list(e)
    for name in e:
        if name == "num_batches_tracked":
            assert torch.equal(a[name], e[name])
        else:
            assert_same(name, a[name], e[name])


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_running_statistics_over_several_batches(kwargs: dict[str, Any]) -> None:
    # Training, evaluation that must leave them, and training again; batches are counted.
    expected, actual = pair(torch.float64, **kwargs)
    for i, training in enumerate([True, True, False, True]):
        x = images(i, torch.float64)
        y, want = actual.train(training)(x), expected.train(training)(x).relu()
        assert_same("y", y, want)
        assert_same_state(actual, expected)


def test_tracking_switched_off_after_construction() -> None:
    # A common way to keep the statistics that there are; they still serve in evaluation.
    expected, actual = pair(torch.float64)
    for module in (expected, actual):
        module(images(0, torch.float64))
        module.track_running_stats = False
    for i, training in enumerate([True, False]):
        x = images(i, torch.float64)
        y, want = actual.train(training)(x), expected.train(training)(x).relu()
        assert_same("y", y, want)
        assert_same_state(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_module_all_in_half(dtype: torch.dtype) -> None:
    # model.to(bfloat16): parameters and statistics are half too, and stay so.
    expected, actual = pair(dtype)
    exact = nn.BatchNorm2d(3, dtype=torch.float64)
    for i in range(3):
        x = images(i, dtype)
        y, eager_y, exact_y = actual(x), expected(x).relu(), exact(x.double()).relu()
        assert_as_exact_as_torch("y", y, eager_y, exact_y)
        for name in ("running_mean", "running_var"):
            found = [getattr(module, name) for module in (actual, expected, exact)]
            assert found[0].dtype is dtype
            assert_as_exact_as_torch(name, *found)


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_state_dict_both_ways(kwargs: dict[str, Any]) -> None:
    # Weights trained with one load into the other, strictly.
    expected, actual = pair(torch.float64, **kwargs)
    for source, target in ((expected, actual), (actual, expected)):
        source(images(0, torch.float64))
        for p in source.parameters():
            nn.init.normal_(p)
        target.load_state_dict(source.state_dict())
        for name, t in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], t), name
        for module in (source, target):  # goes on from the batches counted, also with another batch
            module(images(1, torch.float64))
        assert_same_state(target, source)


def test_a_state_dict_from_before_batches_were_counted() -> None:
    # torch.nn.BatchNorm2d's version 1, as old checkpoints have it: the module's own count goes on.
    expected, actual = pair(torch.float64, momentum=None)
    state = copy.deepcopy(expected.state_dict())
    del state["num_batches_tracked"]
    state._metadata = {"": {"version": 1}}
    for module in (expected, actual):
        module(images(0, torch.float64))
        module.load_state_dict(state)
        module(images(1, torch.float64))
    assert_same_state(actual, expected)


def test_it_is_a_batch_norm() -> None:
    # Code that freezes, counts or exempts from weight decay asks with isinstance.
    module = BatchNormAct2d(3, act="relu6")
    assert isinstance(module, nn.BatchNorm2d)
    assert repr(module) == repr(nn.BatchNorm2d(3)).replace("BatchNorm2d", "BatchNormAct2d")[:-1] + (
        ", act=relu6)"
    )


def test_conversion_of_a_model() -> None:
    # In place, with the same keys; torch's own layers become torch's own. Without an initialised
    # torch.distributed a process is the whole batch: the same bits.
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act="relu6"), nn.BatchNorm2d(4))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    assert convert_sync_batchnorm(model) is model
    assert type(model[1]) is BatchNormAct2d
    assert model[1].sync
    assert "act=relu6, sync=True" in repr(model[1])
    assert type(model[2]) is nn.SyncBatchNorm
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert torch.equal(model[:2](x), twin[:2](x))
    for name, b in model[:2].named_buffers():
        assert torch.equal(b, dict(twin[:2].named_buffers())[name]), name


def test_the_residual_comes_before_the_activation() -> None:
    expected, actual = pair(torch.float64)
    x, residual = images(0, torch.float64), images(1, torch.float64)
    want = (expected(x) + residual).relu()
    assert_same("y", actual(x, residual), want)


def test_what_is_kept_for_backward() -> None:
    # In bytes: x, in training mean and var, and y only where a residual went through an activation;
    # without one z is rebuilt from x, without the other no z is needed.
    x, residual = images(0), images(1)
    for training, act, added in itertools.product(
        [True, False], ["none", "relu"], [None, residual]
    ):
        module = BatchNormAct2d(3, act=act).train(training)
        state = [*module.parameters(), *module.buffers()]
        kept = kept_for_backward(lambda m=module, r=added: m(x, r), exclude=state)
        y = x.nbytes if act == "relu" and added is not None else 0
        assert kept == x.nbytes + y + (2 * 3 * 4 if training else 0)


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(_C.cpu_capability())])
def test_every_instruction_set(level: str) -> None:
    # The kernels are compiled once for each; all other tests run at this processor's own, which can
    # run all lower ones.
    # The shapes' and the combinations' tests run again in a process that is told which to use.
    check = f"from fastcnn import _C; assert _C.cpu_capability() == {level!r}"
    tests = [str(Path(__file__).with_name(f"test_{op}.py")) for op in ("batch_norm_act", "augment")]
    select = "combination or (shape and not 56x56 and not 112x112 and not 28x28) or slices"
    select += " or against_the_reference or masks_follow or one_sample"
    arguments = [*tests, "-q", "-k", select, "-p", "no:cacheprovider"]
    code = f"{check}; import pytest; raise SystemExit(pytest.main({arguments}))"
    env = {**os.environ, "FASTCNN_CPU_CAPABILITY": level}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

"""BatchNormAct2d against torch.nn.BatchNorm2d, which it replaces in a network that exists."""

import copy
import itertools
from typing import Any

import pytest
import torch
from support.batch_norm_cases import Case, normalised
from support.norm_cases import norm_errors
from support.seeds import seeded
from support.tolerance import assert_rounded, assert_same
from torch import Tensor, nn

from fastcnn.lab import saved_for_backward
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


def pair(dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[nn.BatchNorm2d, BatchNormAct2d]:
    return nn.BatchNorm2d(3, dtype=dtype, **kwargs), BatchNormAct2d(3, dtype=dtype, **kwargs)


def images(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = seeded(seed)
    return (2 * torch.randn(4, 3, 5, 7, generator=generator) + 1).to(dtype)


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_running_statistics_over_several_batches(kwargs: dict[str, Any]) -> None:
    # Training, evaluation that must leave them, and training again; batches are counted.
    expected, actual = pair(torch.float64, **kwargs)
    for i, training in enumerate([True, True, False, True]):
        x = images(i, torch.float64)
        y, want = actual.train(training)(x), expected.train(training)(x).relu()
        assert_same(y, want)
        assert_same(actual.state_dict(), expected.state_dict())


def test_tracking_switched_off_after_construction() -> None:
    # A common way to keep the statistics that there are; they still serve in evaluation.
    expected, actual = pair(torch.float64)
    for module in (expected, actual):
        module(images(0, torch.float64))
        module.track_running_stats = False
    for i, training in enumerate([True, False]):
        x = images(i, torch.float64)
        y, want = actual.train(training)(x), expected.train(training)(x).relu()
        assert_same(y, want)
        assert_same(actual.state_dict(), expected.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_module_all_in_half(dtype: torch.dtype) -> None:
    # model.to(bfloat16): parameters and statistics are half too, and stay so.
    actual, exact = BatchNormAct2d(3, dtype=dtype), nn.BatchNorm2d(3, dtype=torch.float64)
    for i in range(3):
        exact.load_state_dict({k: t.double() for k, t in actual.state_dict().items()})
        x = images(i, dtype)
        stats, affine = (exact.running_mean, exact.running_var), (exact.weight, exact.bias)
        case = Case(x, None, *affine, *stats, x, True, "relu")
        errors = norm_errors(normalised(case), dtype)
        assert_rounded("y", actual(x), exact(x.double()).relu(), errors["y"])
        for name in ("running_mean", "running_var"):
            found, expected = getattr(actual, name), getattr(exact, name)
            assert found.dtype is dtype
            assert_rounded(name, found, expected, errors[name].flatten())


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
        assert_same(target.state_dict(), source.state_dict())


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
    assert_same(actual.state_dict(), expected.state_dict())


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
    eager, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    assert convert_sync_batchnorm(model) is model
    assert type(model[1]) is BatchNormAct2d
    assert model[1].sync
    assert "act=relu6, sync=True" in repr(model[1])
    assert type(model[2]) is nn.SyncBatchNorm
    assert model.state_dict().keys() == eager.state_dict().keys()
    assert torch.equal(model[:2](x), eager[:2](x))
    for name, b in model[:2].named_buffers():
        assert torch.equal(b, dict(eager[:2].named_buffers())[name]), name


def test_the_residual_comes_before_the_activation() -> None:
    expected, actual = pair(torch.float64)
    x, residual = images(0, torch.float64), images(1, torch.float64)
    want = (expected(x) + residual).relu()
    assert_same(actual(x, residual), want)


def test_what_is_saved_for_backward() -> None:
    # In bytes: x, mean and var (in evaluation as copies), and y only where a residual went through
    # an activation; without one z is recomputed from x, without the other no z is needed.
    x, residual = images(0), images(1)
    for training, act, added in itertools.product(
        [True, False], ["none", "relu"], [None, residual]
    ):
        module = BatchNormAct2d(3, act=act).train(training)
        state = [*module.parameters(), *module.buffers()]
        kept = saved_for_backward(lambda m=module, r=added: m(x, r), exclude=state)
        y = x.nbytes if act == "relu" and added is not None else 0
        assert kept == x.nbytes + y + 2 * 3 * 4

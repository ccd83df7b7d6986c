"""Synchronised statistics: two gloo processes with a part of a batch each, against all in one.

The oracle is PyTorch in float64 on the whole batch. Outputs and input gradients of the parts are
put together, parameter gradients added up; the limits are support/tolerance.py's for the whole.
"""

import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.activations import ACTS
from support.batch_norm_cases import (
    Case,
    fastcnn_batch_norm_act,
    make_case,
    normalised,
    run,
    torch_batch_norm_act,
)
from support.leave_group import leave_group
from support.norm_cases import compare, halved, norm_errors
from support.roundings import assert_expected_roundings
from support.seeds import seed_all, seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastcnn import functional
from fastcnn.nn import BatchNormAct2d, conv_bn_act, convert_sync_batchnorm
from fastcnn.ops.conv_bn_act import candidates, interface as conv_bn_act_op

WORLD = 2
SECONDS = 600  # far more than the processes need, also beside others; a hang then fails
CHAIN_PARTS = (3, 2)
Results = dict[str, Any]

BATCHES: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {  # sizes, images of each rank
    "even": ((6, 5, 7, 9), (3, 3)),
    "uneven": ((7, 5, 6, 4), (2, 5)),
    "empty": ((4, 3, 5, 7), (4, 0)),  # the end of a loader that was not cut evenly
    "empty first": ((4, 3, 5, 7), (0, 4)),  # merging starts with no values at all
    "one value": ((5, 8, 1, 1), (1, 4)),  # alone it would have no variance
}
KINDS = {  # dtype, layout, act, residual
    "fp32": (torch.float32, "nchw", "relu6", False),
    "fp32 nhwc": (torch.float32, "channels_last", "relu", True),
    "bf16 nhwc": (torch.bfloat16, "channels_last", "none", True),
    "fp64": (torch.float64, "nchw", "relu", True),
}


def whole(batch: str, kind: str) -> Case:
    dtype, layout, act, residual = KINDS[kind]
    return make_case(BATCHES[batch][0], dtype, layout, act, residual)


def synced(case: Case, process_group: Any = None) -> Tensor:
    return fastcnn_batch_norm_act(case, sync=True, process_group=process_group)


def part_of(case: Case, counts: tuple[int, ...], rank: int) -> Case:
    first = sum(counts[:rank])
    images = {k: t for k in ("x", "residual", "dy") if (t := getattr(case, k)) is not None}
    return replace(case, **{k: t[first : first + counts[rank]] for k, t in images.items()})


class Network(nn.Module):
    """A layer of its own and a chain, whose convolutions' gradients go through the statistics."""

    def __init__(self, *acts: str) -> None:
        super().__init__()
        seed_all(0)
        first, second, third = acts or ("relu", "relu6", "relu")
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), BatchNormAct2d(4, act=first)
        self.convs = nn.ModuleList([nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)])
        self.bns = nn.ModuleList([BatchNormAct2d(6, act=second), BatchNormAct2d(4, act=third)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return conv_bn_act(x, list(zip(self.convs, self.bns, strict=True)), residual=x)


class Eager(Network):
    """The same by PyTorch's operators."""

    def forward(self, x: Tensor) -> Tensor:
        x = y = ACTS[self.bn.act](nn.BatchNorm2d.forward(self.bn, self.conv(x)))
        for conv, bn, residual in zip(self.convs, self.bns, (0.0, x), strict=True):
            y = ACTS[bn.act](nn.BatchNorm2d.forward(bn, conv(y)) + residual)
        return y


# No roundings decide on their gradients: no value of theirs is a non-differentiable point.
SMOOTH = ("silu", "gelu", "none")


def chain_images() -> Tensor:
    generator = seeded(3)
    return torch.randn(sum(CHAIN_PARTS), 3, 6, 5, generator=generator).double()


def trained(module: nn.Module, x: Tensor) -> Results:
    """The output, then the gradients of parameters and the buffers by name."""
    y = module(x)
    y.square().sum().backward()
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    found = {"y": y.detach()} | {f"d{k}": p.grad for k, p in inner.named_parameters()}
    return found | dict(inner.named_buffers())


# ---- what a process does -------------------------------------------------------------------------


def cases(rank: int) -> Results:
    return {
        (batch, kind): run(synced, part_of(whole(batch, kind), BATCHES[batch][1], rank))
        for batch in BATCHES
        for kind in KINDS
    }


def network(rank: int) -> Results:
    model = DistributedDataParallel(convert_sync_batchnorm(Network()))
    return trained(model, chain_images().split(CHAIN_PARTS)[rank])


def compiled(rank: int) -> Results:
    # aot_eager changes no arithmetic: the collectives are part of the one graph.
    x = chain_images().split(CHAIN_PARTS)[rank]
    eager = convert_sync_batchnorm(Network())
    model = copy.deepcopy(eager)
    model.compile(fullgraph=True, backend="aot_eager")
    return {"eager": trained(eager, x), "compiled": trained(model, x)}


def without_others(rank: int) -> Results:
    # Alone, so a collective would wait for the other one until its timeout.
    if rank == 1:
        distributed.new_group([0])  # every process takes part in making a group
        return {}
    alone, found = distributed.new_group([0]), {}
    case = whole("uneven", "fp32")
    found["group of one"] = run(lambda c: synced(c, alone), case)
    found["eval"] = run(synced, replace(case, training=False))
    found["errors"] = []
    for kwargs in ({"process_group": alone}, {"sync": True, "process_group": "gloo"}):
        try:
            functional.batch_norm_act(case.x, None, None, training=True, **kwargs)
        except (TypeError, ValueError) as error:
            found["errors"].append((type(error).__name__, str(error)))
    return found


def too_few(rank: int) -> Results:
    # One value on rank 0, or none anywhere: no unbiased variance, so the running ones stay.
    found = {}
    for n in (1, 0):
        case = make_case((2, 3, 1, 1), torch.float32, act="none")
        images = {k: getattr(case, k)[: n if rank == 0 else 0] for k in ("x", "dy")}
        found[n] = run(synced, replace(case, **images))
    return found


def planned(rank: int) -> Results:
    # One rank's plans are all Triton's, whose statistics are its own part's: shared ones are not
    # taken from there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_bn_act_op, "is_planned", lambda x: True)
        patch.setattr(candidates, "choose", lambda _: "triton" if rank == 0 else "cudnn")
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        found = {}
        for name, parts in (("uneven", CHAIN_PARTS), ("empty", (sum(CHAIN_PARTS), 0))):
            model = convert_sync_batchnorm(Network(*SMOOTH).float())
            x = chain_images().float().split(parts)[rank]
            x = x.contiguous(memory_format=torch.channels_last)
            found[name] = trained(DistributedDataParallel(model), x)
    return found


QUICK: list[Callable[[int], Results]] = [cases, network, planned, without_others, too_few]


def work(rank: int, folder: str, *scenarios: Callable[[int], Results]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=SECONDS),
    )
    found = {scenario.__name__: scenario(rank) for scenario in scenarios}
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


def fail_on_one_rank(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    if rank == 1:
        raise RuntimeError("rank 1 fails on purpose")
    synced(make_case((2, 3, 4, 5), torch.float32))


def spawn(target: Callable[..., None], folder: Path, *more: Any) -> None:
    """Run target in WORLD processes. Where one fails or the time is over, none is left behind.

    They are forked by a server that imported this module once: four imports were half of the time.
    """
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context = torch.multiprocessing.start_processes(
            target, (str(folder), *more), nprocs=WORLD, join=False, start_method="forkserver"
        )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):  # raises with the traceback of a process that failed
            assert time.monotonic() < deadline, f"the processes still run after {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()


def found_by_ranks(folder: Path, *scenarios: Callable[[int], Results]) -> list[Results]:
    spawn(work, folder, *scenarios)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return found_by_ranks(tmp_path_factory.mktemp("ranks"), *QUICK)


# ---- what must have come out ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_parts_of_a_batch(ranks: list[Results], batch: str, kind: str) -> None:
    case, layout = whole(batch, kind), LAYOUTS[KINDS[kind][1]]
    parts = [found["cases"][batch, kind] for found in ranks]
    exact, terms = run(torch_batch_norm_act, case.to(torch.float64)), normalised(case)
    halves, actual = {} if case.residual is None else halved(terms), {}
    for k in exact:
        if k.startswith("running"):  # the same bits on each rank: networks must not drift apart
            assert torch.equal(parts[0][k], parts[1][k]), k
            actual[k] = parts[0][k]
        elif k in ("dweight", "dbias"):  # each rank's is rounded
            actual[k] = parts[0][k] + parts[1][k]
            halves[k] = sum(part[k].double().abs() for part in parts)
        else:
            actual[k] = torch.cat([part[k] for part in parts]).contiguous(memory_format=layout)
    compare(case, actual, exact, norm_errors(terms, case.x.dtype), halves)


def test_a_network_in_ddp(ranks: list[Results]) -> None:
    # DDP averages the gradients; of a loss that is a sum, the whole batch's is WORLD times that.
    expected, parts = trained(Network(), chain_images()), [found["network"] for found in ranks]
    y = torch.cat([part["y"] for part in parts])
    for part in parts:
        assert part.keys() == expected.keys()
        for name, want in expected.items():
            got = part[name] * WORLD if name.startswith("d") else part[name]
            got = y if name == "y" else got
            assert_same(got, want, name=name)


@pytest.mark.parametrize("parts", ["uneven", "empty"])
def test_ranks_with_different_plans(ranks: list[Results], parts: str) -> None:
    found = [rank["planned"][parts] for rank in ranks]
    y = torch.cat([part["y"] for part in found])
    for part in found:
        whole = {k: t * WORLD if k.startswith("d") else t for k, t in part.items()} | {"y": y}
        assert_expected_roundings(
            whole, lambda: trained(Eager(*SMOOTH), chain_images()), torch.float32
        )


@pytest.mark.slow
def test_compiled_as_one_graph(tmp_path: Path) -> None:
    for found in found_by_ranks(tmp_path, compiled):
        for name, want in found["compiled"]["eager"].items():
            assert torch.equal(found["compiled"]["compiled"][name], want), name


def test_where_there_is_nobody_to_talk_to(ranks: list[Results]) -> None:
    # A group of one and evaluation: no communication, and the bits of the unsynchronised call.
    found, case = ranks[0]["without_others"], whole("uneven", "fp32")
    for name, training in (("group of one", True), ("eval", False)):
        for k, want in run(fastcnn_batch_norm_act, replace(case, training=training)).items():
            assert torch.equal(found[name][k], want), (name, k)
    assert found["errors"] == [
        (
            "ValueError",
            "batch_norm_act: process_group: expected None beside sync=False, got a group",
        ),
        (
            "TypeError",
            "batch_norm_act: process_group: expected a torch.distributed.ProcessGroup with this "
            "process in it, or None for all processes, got str",
        ),
    ]


def test_fewer_than_two_values_in_all(ranks: list[Results]) -> None:
    case = make_case((2, 3, 1, 1), torch.float32, act="none")
    for found in ranks:
        for n, result in found["too_few"].items():
            for k in ("running_mean", "running_var"):
                assert torch.equal(result[k], getattr(case, k)), (n, k)
            assert torch.equal(result["y"], case.bias[None, :, None, None].expand_as(result["y"]))
            assert not result["dx"].any()
    assert ranks[0]["too_few"][1]["y"].shape == (1, 3, 1, 1)


def test_a_failing_rank_does_not_hang(tmp_path: Path) -> None:
    # The other one waits for it in a collective.
    start = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="fails on purpose"):
        spawn(fail_on_one_rank, tmp_path)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_make_the_whole(layout: str) -> None:
    # The operators by themselves, with three parts, as CUDA runs them too.
    ops, case = torch.ops.fastcnn, make_case((6, 5, 4, 7), torch.float64, layout, residual=True)
    y, mean, var = ops.batch_norm_act_fwd(case.x, case.residual, case.weight, case.bias, 1e-5, 1)
    parts = [part_of(case, (1, 3, 2), i) for i in range(3)]
    stats = torch.stack([ops.batch_norm_act_stats(part.x) for part in parts])
    merged = ops.batch_norm_join_stats(stats)
    for got, want in zip(merged, (mean, var, torch.tensor([6 * 28.0]).double()), strict=True):
        assert_same(got, want)
    rest = (case.weight, case.bias, *merged[:2])
    sums = [
        ops.batch_norm_act_reduce(p.dy, p.x, y_, *rest, 1e-5, 1, True)
        for p, y_ in zip(parts, y.split((1, 3, 2)), strict=True)
    ]
    dx, dresidual, dweight, dbias = ops.batch_norm_act_bwd(
        case.dy, case.x, y, *rest, 1e-5, 1, True, True
    )
    assert torch.equal(torch.cat([s[0] for s in sums]), dresidual)
    totals = [torch.stack([s[i] for s in sums]).sum(0) for i in (1, 2)]
    assert_same(totals, [dweight, dbias])
    got = ops.batch_norm_act_dx(case.dy, case.x, y, *rest, *totals, merged[2], 1e-5, 1, True)
    assert_same(got, dx)

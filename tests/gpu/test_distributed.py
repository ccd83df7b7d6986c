"""Process groups of one process: what there is to communicate goes through the real library."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import DEVICE, needs_gpu
from support.gpu_networks import assert_bitwise, batch, expected_results, networks, results
from support.seeds import seed_all
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastcnn import convert
from fastcnn.common.process_group import Group, group_of
from fastcnn.ops.batch_norm_act import interface as batch_norm_act
from fastcnn.ops.conv_bn_act import step as conv_bn_act_step

# Not by gloo: PyTorch 2.13 holds the interpreter's lock while destroy_process_group waits for a
# thread that may need it, to let go of a DDP reduction, and then waits forever.
pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A group of this process; NCCL is told its GPU, or it would guess, and say so."""
    distributed.init_process_group(
        "nccl",
        init_method=f"file://{folder}/store",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0),
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def gathers_even_alone(op: str, sync: bool, process_group: object) -> Group | None:
    """group_of, which sees that there is nobody to talk to: here it talks to itself."""
    group = group_of(op, sync, process_group)
    return Group(distributed.group.WORLD.group_name, 1) if sync and group is None else group


def test_synchronised_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The collectives run on streams of their own: statistics that are used before they have come,
    # or sums that are gathered before they are there, would be garbage.
    fused, plain = networks()
    synced = convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    x, target = batch()
    expected = expected_results(plain, x, target)
    names: list[str] = []
    gather = torch.ops._c10d_functional.all_gather_into_tensor

    def counted(*args: Any) -> Any:
        names.append(args[2])
        return gather(*args)

    with alone(tmp_path):
        assert_bitwise(results(copy.deepcopy(synced), x, target), results(fused, x, target))
        monkeypatch.setattr(batch_norm_act, "group_of", gathers_even_alone)
        monkeypatch.setattr(conv_bn_act_step, "group_of", gathers_even_alone)
        monkeypatch.setattr(torch.ops._c10d_functional, "all_gather_into_tensor", counted)
        found = results(synced, x, target)
    assert len(names) == 8  # statistics and sums of four batch norms
    expected.check(found)


# PyTorch's own gradient of a 1x1 weight in channels_last may have other strides of its sizes of 1.
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_ddp_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    # DDP hooks every parameter's gradient, which must come exactly once.
    plain, _ = networks(dropout=0.3)
    with alone(tmp_path):
        wrapped = DistributedDataParallel(copy.deepcopy(plain), device_ids=[0])
        x, target = batch()
        found = []
        for model in (plain, wrapped):
            seed_all(6)
            found.append(results(model, x, target))
    assert_bitwise({k.replace("module.", ""): t for k, t in found[1].items()}, found[0])
    assert all(p.device.type == DEVICE.type for p in wrapped.parameters())

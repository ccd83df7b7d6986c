"""Processes that share a batch: a torch.distributed group as an autograd.Function can take it."""

from typing import NamedTuple

import torch
from torch import Tensor, distributed


class Group(NamedTuple):
    """Two or more processes; name: under which torch's collectives find them."""

    name: str
    size: int


def group_of(op: str, sync: bool, process_group: object) -> Group | None:
    """Return the processes to share statistics with, or None where there is no other one.

    Without an initialised torch.distributed there is one process, as torch.nn.SyncBatchNorm has it.
    """
    if not isinstance(sync, bool):
        raise TypeError(f"{op}: sync: expected a bool, got {type(sync).__name__}")
    if not sync:
        if process_group is not None:
            raise ValueError(f"{op}: process_group: expected None beside sync=False, got a group")
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = distributed.group.WORLD if process_group is None else process_group
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{op}: process_group: expected a torch.distributed.ProcessGroup with this process in "
            f"it, or None for all processes, got {type(group).__name__}"
        )
    size = group.size()
    return None if size == 1 else Group(group.group_name, size)


def gather(t: Tensor, group: Group) -> Tensor:
    """Return every process's t, dense and of one shape: [size, *t.shape] in the order of ranks."""
    ops = torch.ops._c10d_functional  # not there in a torch without distributed
    gathered = ops.wait_tensor(ops.all_gather_into_tensor(t, group.size, group.name))
    return gathered.view(group.size, *t.shape)

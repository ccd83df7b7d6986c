"""batch_norm_act with the statistics of a batch that several processes hold parts of.

    forward   stats_r = count, mean, var of x        by each rank r of its own part of the batch
              gathered: one vector of 2 * c + 1 numbers from each rank
              mean, var, total                       merged in the order of the ranks by Chan's
                                                     formula: the same bits on each rank
              y = act((x - mean) * rstd * weight + bias + residual)
    backward  dbias_r = sum(dz)                      over rank r's own part
              dweight_r = sum(dz * (x - mean)) * rstd
              gathered and summed: one vector of 2 * c numbers from each rank, where dx is wanted
              dx = rstd * weight * (dz - sum(dbias_r) / total
                                       - (x - mean) * rstd * sum(dweight_r) / total)

total: the values a channel on all ranks. A part may be empty: its count is 0, and its rank still
takes part in each collective. dweight and dbias stay the rank's own sums: DistributedDataParallel
averages them over the ranks, as it does beside torch.nn.SyncBatchNorm. The running statistics move
by mean and by the variance made unbiased with total, alike on each rank; total stays a tensor, so
that no process waits for its device. Where total is below 2 they stay.

Passes over memory are those of batch_norm_act. A rank that leaves out a call that the others make
lets them wait until torch.distributed's timeout.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.common.dtypes import acc_type, as_acc, new_channels
from fastcnn.common.library import declare
from fastcnn.common.process_group import Group, gather


def _stats_fake(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.shape[1] + 1, dtype=acc_type(x))


def _merge_fake(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c = gathered.shape[1] // 2
    return gathered.new_empty(c), gathered.new_empty(c), gathered.new_empty(1)


def _reduce_fake(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    want_dresidual = args[-1]
    dresidual = torch.empty_like(x) if want_dresidual else x.new_empty(0)
    return dresidual, new_channels(x), new_channels(x)


def _dx_fake(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


declare("batch_norm_act_stats(Tensor x) -> Tensor", _stats_fake)
declare(
    "batch_norm_join_stats(Tensor gathered) -> (Tensor mean, Tensor var, Tensor total)",
    _merge_fake,
)
declare(
    "batch_norm_act_reduce(Tensor dy, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor var, float eps, int act, bool want_dresidual) "
    "-> (Tensor dresidual, Tensor dweight, Tensor dbias)",
    _reduce_fake,
)
declare(
    "batch_norm_act_dx(Tensor dy, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor var, Tensor dweight, Tensor dbias, Tensor total, float eps, int act, "
    "bool training) -> Tensor",
    _dx_fake,
)

_stats = torch.ops.fastcnn.batch_norm_act_stats.default
_merge = torch.ops.fastcnn.batch_norm_join_stats.default
_reduce = torch.ops.fastcnn.batch_norm_act_reduce.default
_dx = torch.ops.fastcnn.batch_norm_act_dx.default


def merged_statistics(x: Tensor, group: Group | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and the number of values a channel, over all ranks."""
    own = _stats(x)
    mean, var, total = _merge(own[None] if group is None else gather(own, group))
    return mean, var, total


def shared_sums(dweight: Tensor, dbias: Tensor, group: Group) -> Tensor:
    """Return the ranks' sums added up, as [2, c]."""
    return gather(torch.stack((dweight, dbias)), group).sum(0)


def synced_bwd(
    dy: Tensor,
    x: Tensor,
    saved: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: int,
    want_dx: bool,
    want_dresidual: bool,
    total: Tensor,
    group: Group,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return dx, dresidual, and dweight and dbias of this rank; dy in x's layout."""
    fixed = as_acc(x, weight), as_acc(x, bias), mean, var
    dresidual, dweight, dbias = _reduce(dy, x, saved, *fixed, eps, act, want_dresidual)
    if not want_dx:
        return None, dresidual, dweight, dbias
    sums = shared_sums(dweight, dbias, group)
    if want_dresidual:  # dz lies there
        dy, saved, act = dresidual, None, ACT_NUMBER["none"]
    dx = _dx(dy, x, saved, *fixed, *sums.unbind(), total, eps, act, True)
    return dx, dresidual, dweight, dbias


def frozen_bwd(
    dy: Tensor,
    x: Tensor,
    saved: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: int,
) -> Tensor:
    """Return dx = rstd * weight * dz, with fixed statistics: no sums, 3 passes instead of 5."""
    zeros = new_channels(x).zero_()
    stats = as_acc(x, mean), as_acc(x, var)
    return _dx(dy, x, saved, weight, bias, *stats, zeros, zeros, zeros.new_ones(1), eps, act, False)

"""BatchNormAct2d."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from fastcnn.common.activation import Activation, act_number
from fastcnn.functional import batch_norm_act


def uses_batch_statistics(bn: _BatchNorm) -> bool:
    """Whether the next forward normalises with the batch's own mean and variance."""
    return bn.training or bn.running_mean is None


def running_statistics(bn: _BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """Return mean and var that the next forward uses or moves, if any.

    As in torch.nn.BatchNorm2d, track_running_stats may be switched off at any time.
    """
    if bn.training and not bn.track_running_stats:
        return None, None
    return bn.running_mean, bn.running_var


def step_momentum(bn: _BatchNorm) -> float:
    """Count one more batch and return the weight of its statistics in the running ones."""
    counts = bn.training and bn.track_running_stats
    if not counts or bn.num_batches_tracked is None:
        return 0.0 if bn.momentum is None else bn.momentum
    bn.num_batches_tracked.add_(1)
    if bn.momentum is None:
        return 1.0 / float(bn.num_batches_tracked)
    return bn.momentum


class BatchNormAct2d(torch.nn.BatchNorm2d):
    """Batch normalisation, an optional residual and an activation as one fused operation.

    ``forward(x, residual=None) = act(batch_norm(x) + residual)``, where several tensors for x stand
    for their concatenation along the channels. Parameters, buffers, state_dict
    keys and running statistics are torch.nn.BatchNorm2d's, which it is an instance of. Shapes,
    dtypes and errors are those of :func:`fastcnn.functional.batch_norm_act`.

    Args:
        num_features: channels of the input.
        eps: added to the variance.
        momentum: weight of the new running statistics; None for their cumulative average.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics; without them evaluation uses
            the batch's.
        act: "none", "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "gelu" (by erf), "sigmoid"
            or "hardswish".
        sync: whether training uses the statistics of all processes' batches, as
            torch.nn.SyncBatchNorm does; :func:`convert_sync_batchnorm` switches it on in a whole
            model.
        process_group: with sync=True, whose batches; None for all processes.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Example:
        >>> layer = fastcnn.nn.BatchNormAct2d(8, act="silu")
        >>> x = torch.randn(2, 8, 4, 4)
        >>> layer(x, residual=x).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        act: Activation = "relu",
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        act_number("BatchNormAct2d", act)
        self.act: Activation = act
        self.sync = sync
        self.process_group = process_group

    def forward(
        self, input: Tensor | tuple[Tensor, ...] | list[Tensor], residual: Tensor | None = None
    ) -> Tensor:
        """Return act(batch_norm(input) + residual)."""
        return batch_norm_act(
            input,
            *running_statistics(self),
            self.weight,
            self.bias,
            uses_batch_statistics(self),
            step_momentum(self),
            self.eps,
            residual=residual,
            act=self.act,
            sync=self.sync,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Return the arguments as torch.nn.BatchNorm2d prints them, and the activation."""
        return f"{super().extra_repr()}, act={self.act}" + (", sync=True" if self.sync else "")


def convert_sync_batchnorm(
    module: torch.nn.Module, process_group: ProcessGroup | None = None
) -> torch.nn.Module:
    """Synchronise all batch norms of a model over processes, in place, and return it.

    ``BatchNormAct2d`` layers get ``sync=True``; other batch norms are replaced as
    torch.nn.SyncBatchNorm.convert_sync_batchnorm does. That method itself is not for models with
    ``BatchNormAct2d``: it would replace them too, and lose their activations and residuals.

    Args:
        module: any; where it is itself a batch norm of torch.nn, use what is returned.
        process_group: whose batches; None for all processes.

    Returns:
        The model; a new layer where it is itself a batch norm of torch.nn.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), fastcnn.nn.BatchNormAct2d(8))
        >>> fastcnn.nn.convert_sync_batchnorm(model)[1].sync
        True
    """
    if isinstance(module, BatchNormAct2d):
        module.sync, module.process_group = True, process_group
        return module
    if isinstance(module, _BatchNorm):
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module

"""Layers: torch.nn's own with fused forward and backward, same names and state_dict keys."""

from fastcnn.nn.batch_norm_act import BatchNormAct2d, convert_sync_batchnorm
from fastcnn.nn.conv_bn_act import conv_bn_act
from fastcnn.nn.group_norm_act import GroupNormAct, InstanceNormAct2d, LayerNorm2d

__all__ = [
    "BatchNormAct2d",
    "GroupNormAct",
    "InstanceNormAct2d",
    "LayerNorm2d",
    "conv_bn_act",
    "convert_sync_batchnorm",
]

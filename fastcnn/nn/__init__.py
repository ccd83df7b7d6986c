"""Layers: torch.nn's own with fused forward and backward, same names and state_dict keys."""

from fastcnn.nn.batch_norm_act import BatchNormAct2d, convert_sync_batchnorm
from fastcnn.nn.conv_bn_act import Block, conv_bn_act, conv_bn_act_blocks
from fastcnn.nn.depthwise_conv2d import DepthwiseConv2d
from fastcnn.nn.dropout import Dropout, Dropout2d
from fastcnn.nn.group_norm_act import GroupNormAct, InstanceNormAct2d, LayerNorm2d
from fastcnn.nn.linear_act import LinearAct
from fastcnn.nn.squeeze_excite import SqueezeExcite
from fastcnn.nn.upsample import Upsample

__all__ = [
    "BatchNormAct2d",
    "Block",
    "DepthwiseConv2d",
    "Dropout",
    "Dropout2d",
    "GroupNormAct",
    "InstanceNormAct2d",
    "LayerNorm2d",
    "LinearAct",
    "SqueezeExcite",
    "Upsample",
    "conv_bn_act",
    "conv_bn_act_blocks",
    "convert_sync_batchnorm",
]


def __dir__() -> list[str]:
    return __all__

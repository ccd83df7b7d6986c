"""The same mathematics in plain PyTorch, differentiable by autograd and runnable in float64."""

from fastcnn.reference.augment import augment
from fastcnn.reference.batch_norm_act import batch_norm_act
from fastcnn.reference.conv2d_int8 import conv2d_int8
from fastcnn.reference.conv_bn_act import conv_bn_act, conv_bn_act_blocks
from fastcnn.reference.depthwise_conv2d import depthwise_conv2d
from fastcnn.reference.dropout import dropout
from fastcnn.reference.group_norm_act import group_norm_act
from fastcnn.reference.linear_act import linear_act
from fastcnn.reference.squeeze_excite import squeeze_excite
from fastcnn.reference.upsample import upsample

__all__ = [
    "augment",
    "batch_norm_act",
    "conv2d_int8",
    "conv_bn_act",
    "conv_bn_act_blocks",
    "depthwise_conv2d",
    "dropout",
    "group_norm_act",
    "linear_act",
    "squeeze_excite",
    "upsample",
]

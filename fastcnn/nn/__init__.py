"""Layers: torch.nn's own with fused forward and backward, same names and state_dict keys."""

from fastcnn.nn.batch_norm_act import BatchNormAct2d
from fastcnn.nn.conv_bn_act import conv_bn_act
from fastcnn.nn.upsample import Upsample

__all__ = ["BatchNormAct2d", "Upsample", "conv_bn_act"]

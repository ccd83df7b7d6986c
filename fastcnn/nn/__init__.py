"""Layers: torch.nn's own with fused forward and backward, same names and state_dict keys."""

from fastcnn.nn.augment import Augment
from fastcnn.nn.batch_norm_act import BatchNormAct2d, convert_sync_batchnorm
from fastcnn.nn.conv_bn_act import conv_bn_act

__all__ = ["Augment", "BatchNormAct2d", "conv_bn_act", "convert_sync_batchnorm"]

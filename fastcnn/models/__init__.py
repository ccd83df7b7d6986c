"""Networks with torchvision's names and keys, in plain PyTorch: create_model, list_models."""

from fastcnn.models.alexnet import AlexNet, alexnet
from fastcnn.models.densenet import DenseNet, densenet121
from fastcnn.models.fcn import FCN, fcn_resnet50, fcn_resnet101
from fastcnn.models.googlenet import GoogLeNet, GoogLeNetOutputs, googlenet
from fastcnn.models.inception import Inception3, InceptionOutputs, inception_v3
from fastcnn.models.mobilenet import MobileNetV2, mobilenet_v2
from fastcnn.models.network import FeatureInfo, Features, Network
from fastcnn.models.registry import create_model, list_models
from fastcnn.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from fastcnn.models.resnet_cifar import (
    CifarBlock,
    CifarResNet,
    plain20,
    plain32,
    plain44,
    plain56,
    plain110,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from fastcnn.models.unet import UNet, unet
from fastcnn.models.unet_resnet import (
    UNetResNet,
    unet_resnet18,
    unet_resnet34,
    unet_resnet50,
    unet_resnet101,
    unet_resnet152,
)
from fastcnn.models.vgg import (
    VGG,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)
from fastcnn.models.weights import Loaded, load_weights

__all__ = [
    "FCN",
    "VGG",
    "AlexNet",
    "BasicBlock",
    "Bottleneck",
    "CifarBlock",
    "CifarResNet",
    "DenseNet",
    "FeatureInfo",
    "Features",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "Inception3",
    "InceptionOutputs",
    "Loaded",
    "MobileNetV2",
    "Network",
    "ResNet",
    "UNet",
    "UNetResNet",
    "alexnet",
    "create_model",
    "densenet121",
    "fcn_resnet50",
    "fcn_resnet101",
    "googlenet",
    "inception_v3",
    "list_models",
    "load_weights",
    "mobilenet_v2",
    "plain20",
    "plain32",
    "plain44",
    "plain56",
    "plain110",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "unet",
    "unet_resnet18",
    "unet_resnet34",
    "unet_resnet50",
    "unet_resnet101",
    "unet_resnet152",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def __dir__() -> list[str]:
    return __all__

"""The zoo's networks beside torchvision's and segmentation_models_pytorch's, with one state."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.chains import randomize
from support.oracles import segmentation_models_pytorch, torchvision
from support.seeds import seed_all, seeded
from torch import Tensor, nn

from fastcnn import keep_freed_memory
from fastcnn.models.registry import architecture

keep_freed_memory()  # half of the time were page faults of large weights and gradients

# Names and the smallest images that the network takes in training.
CLASSIFIERS = {
    "alexnet": 63,
    "vgg11": 32, "vgg11_bn": 32, "vgg13": 32, "vgg13_bn": 32,
    "vgg16": 32, "vgg16_bn": 32, "vgg19": 32, "vgg19_bn": 32,
    "resnet18": 65, "resnet34": 65, "resnet50": 65, "resnet101": 65, "resnet152": 65,
    "resnext50_32x4d": 65, "resnext101_32x8d": 65,
    "wide_resnet50_2": 65, "wide_resnet101_2": 65,
    "googlenet": 65,
    "inception_v3": 299,  # the auxiliary classifier's 5x5 convolution wants 17x17 maps
    "mobilenet_v2": 65,
    "densenet121": 65,
}  # fmt: skip
SEGMENTERS = {f"fcn_resnet{depth}": 33 for depth in (50, 101)} | {
    f"unet_resnet{depth}": 65 for depth in (18, 34, 50, 101, 152)
}
ZOO = CLASSIFIERS | SEGMENTERS

# Of each kind of code the quickest; the others are left to `make test-all`.
QUICK = {"alexnet", "vgg11_bn", "resnet18", "mobilenet_v2", "densenet121", "unet_resnet18"}


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Names for parametrize, marked slow but for the quick ones."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def theirs(name: str, num_classes: int, **options: Any) -> nn.Module:
    """The oracle's network; its initial weights are its own, torchvision's in every case."""
    if name.startswith("unet_"):
        return segmentation_models_pytorch.Unet(name[5:], encoder_weights=None, classes=num_classes)
    if name.startswith("fcn_"):
        build = getattr(torchvision.models.segmentation, name)
        return build(weights_backbone=None, num_classes=num_classes, **options)
    if name == "densenet121":  # the builder fixes block_config
        return torchvision.models.DenseNet(num_classes=num_classes, **options)
    if name in ("googlenet", "inception_v3"):  # it warns of another default to come
        options = {"init_weights": True} | options
    return getattr(torchvision.models, name)(num_classes=num_classes, **options)


def ours(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Ours as it is written: what builders do beside, convert above all, takes a second a model."""
    return architecture(name, num_classes=num_classes, **options)


def pair(name: str, num_classes: int = 10, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs with the same weights: random, in the size that keeps activations alike."""
    with torch.device("meta"):  # drawing VGG's 138M weights takes a second, twice
        models = ours(name, num_classes, **options), theirs(name, num_classes, **options)
        for model in models:
            _narrow_head(model)
    models[1].to_empty(device="cpu")
    fill(models[1])
    models[0].load_state_dict(models[1].state_dict(), assign=True)  # shared, as nobody changes them
    for name, buffer in list(models[0].named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(models[0].get_submodule(parent), leaf, buffer.clone())
    return models


def _narrow_head(model: nn.Module) -> None:
    """Give AlexNet's and VGG's heads, nine tenths of their weights, 32 features for 4096."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and 4096 in layer.weight.shape:
            layer.out_features, layer.in_features = (
                32 if n == 4096 else n for n in layer.weight.shape
            )
            layer.weight = nn.Parameter(torch.empty(layer.out_features, layer.in_features))
            layer.bias = nn.Parameter(torch.empty(layer.out_features))


def fill(model: nn.Module) -> None:
    """Weights of deviation sqrt(2 / fan_in) from a million draws, over and over; biases of 0.1."""
    noise = torch.randn(1_000_003, generator=seeded(3))
    for p in model.parameters():
        gain = math.sqrt(2 / p[0].numel()) if p.ndim > 1 else 0.1
        repeats = -(-p.numel() // len(noise))
        p.data.copy_(noise.repeat(repeats)[: p.numel()].view_as(p) * gain)
    for b in model.buffers():
        b.zero_()
    randomize(model)


def outputs(y: Any) -> dict[str, Tensor]:
    """A network's outputs by name: a tensor, a named tuple or a dict."""
    if isinstance(y, Tensor):
        return {"out": y}
    return dict(y) if isinstance(y, dict) else y._asdict()


def results(model: nn.Module, x: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """Outputs, gradients of x and of every parameter, and buffers, after one call."""
    x = x.clone().requires_grad_()
    seed_all(seed)  # dropout
    y = outputs(model(x))
    seed_all(seed)
    torch.autograd.backward(list(y.values()), [torch.randn_like(v) for v in y.values()])
    found = {name: v.detach() for name, v in y.items()}
    found["dx"] = x.grad
    found |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers())


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same kernels of PyTorch in the same order: the same bits."""
    assert list(actual) == list(expected)
    differing = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not differing, differing
    assert all(torch.isfinite(v).all() for v in actual.values())

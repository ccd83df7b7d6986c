"""Networks of other people, as `make bench-models` runs them, and each candidate's call.

A candidate is one way to make a training step, or to run inference, of one network: ours, eager,
torch.compile, OpenVINO. All get channels_last, and the types that suit them best: in bfloat16 all
train under autocast; for inference ours runs under autocast from float32 weights, which it folds
and casts once, and eager and torch.compile have bfloat16 weights, which spares them those casts.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from support.oracles import segmentation_models_pytorch, timm, torchvision
from torch import Tensor, nn

import fastcnn

__all__ = ["NETWORKS", "QUICK", "Network", "candidates"]

Run = Callable[[], object]
Model = Any


class Network(NamedTuple):
    """How a network is made, and the images it gets."""

    make: Callable[[], nn.Module]
    size: int = 224
    batch: int = 8

    def built(self) -> nn.Module:
        """Return it, of the same weights each time."""
        torch.manual_seed(0)
        return self.make().to(memory_format=torch.channels_last)


def _of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(torchvision.models.get_model, name, weights=None, **options)


NETWORKS = {
    "resnet18": Network(_of_torchvision("resnet18")),
    "resnet50": Network(_of_torchvision("resnet50")),
    "resnext50": Network(_of_torchvision("resnext50_32x4d")),
    "wide_resnet50_2": Network(_of_torchvision("wide_resnet50_2")),
    "vgg16_bn": Network(_of_torchvision("vgg16_bn")),
    "mobilenet_v2": Network(_of_torchvision("mobilenet_v2")),
    "mobilenet_v3_large": Network(_of_torchvision("mobilenet_v3_large")),
    "mobilenet_v3_small": Network(_of_torchvision("mobilenet_v3_small")),
    "efficientnet_b0": Network(_of_torchvision("efficientnet_b0")),
    "efficientnet_v2_s": Network(_of_torchvision("efficientnet_v2_s")),
    "mnasnet": Network(_of_torchvision("mnasnet1_0")),
    "regnet_y_400mf": Network(_of_torchvision("regnet_y_400mf")),
    "shufflenet_v2": Network(_of_torchvision("shufflenet_v2_x1_0")),
    "densenet121": Network(_of_torchvision("densenet121")),
    "inception_v3": Network(
        _of_torchvision("inception_v3", aux_logits=False, init_weights=False), 299
    ),
    "convnext_tiny": Network(_of_torchvision("convnext_tiny")),
    "deeplabv3_mobilenet": Network(
        _of_torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=21),
        256,
        4,
    ),
    # As anybody would write it: create_model converts what it makes.
    "unet": Network(lambda: fastcnn.revert(fastcnn.create_model("unet", num_classes=2)), 256, 4),
    "smp_unet": Network(
        lambda: segmentation_models_pytorch.Unet("resnet34", encoder_weights=None), 256, 4
    ),
    "timm_mobilenetv4": Network(partial(timm.create_model, "mobilenetv4_conv_small")),
}
# One of each kind of cost: plain, residual, depthwise, squeeze-and-excitation, concatenation.
QUICK = ["resnet50", "vgg16_bn", "mobilenet_v2", "efficientnet_b0", "densenet121", "convnext_tiny"]


def candidates(network: Network, what: str, half: bool, compiles: bool) -> dict[str, Run]:
    """Return the calls by name, "ours" first; torch.compile's takes a minute to make."""
    x = torch.randn(network.batch, 3, network.size, network.size)
    x = x.to(memory_format=torch.channels_last)
    return (_training if what == "training" else _inference)(network, x, half, compiles)


def _training(network: Network, x: Tensor, half: bool, compiles: bool) -> dict[str, Run]:
    eager = network.built().train()
    ours = fastcnn.convert(copy.deepcopy(eager))
    with torch.no_grad():
        _, classes, *sides = _logits(eager(x[:2])).shape
    labels = torch.randint(max(classes, 2), (len(x), *sides))

    def step(model: Model) -> Run:
        def run() -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = _logits(model(x))
            if classes == 1:
                loss = F.binary_cross_entropy_with_logits(y[:, 0].float(), labels.float())
            else:
                loss = F.cross_entropy(y.float(), labels)
            loss.backward()

        return run

    ways = {"ours": ours, "eager": eager}
    if compiles:
        ways["torch.compile"] = torch.compile(copy.deepcopy(eager), dynamic=False)
    return {name: step(model) for name, model in ways.items()}


def _inference(network: Network, x: Tensor, half: bool, compiles: bool) -> dict[str, Run]:
    model = network.built().eval()
    ours = fastcnn.convert(copy.deepcopy(model), mode="infer")

    def call(model: Model, x: Tensor, autocast: bool) -> Run:
        def run() -> Any:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(x)

        return run

    latency = _openvino(model, x, half)
    eager, image = (model.bfloat16(), x.bfloat16()) if half else (model, x)
    runs = {"ours": call(ours, x, half), "eager": call(eager, image, False)}
    if compiles:
        frozen = torch.compile(copy.deepcopy(eager), dynamic=False, options={"freezing": True})
        runs["torch.compile"] = call(frozen, image, False)
    return {**runs, "OpenVINO": latency}


def _openvino(model: nn.Module, x: Tensor, half: bool) -> Run:
    """One synchronous call on all cores, from its own NCHW."""
    import openvino

    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    found = openvino.convert_model(plain, example_input=x.contiguous(), input=list(x.shape))
    precision = "bf16" if half else "f32"
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = openvino.Core().compile_model(found, "CPU", options).create_infer_request()
    image = x.contiguous().numpy()
    return lambda: request.infer({0: image}, share_inputs=True, share_outputs=True)


def _logits(y: Any) -> Tensor:
    """Return what is classified: of torchvision's dense networks the main output."""
    return y["out"] if isinstance(y, dict) else y

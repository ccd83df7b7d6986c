"""Whole networks through fastcnn.convert: a training step, and inference beside OpenVINO.

torchvision's ResNets and this package's ResNet-20 and U-Net (64 channels, 4 levels, bilinear), in
channels_last, beside themselves unconverted ("eager"), beside torch.compile of that, whose first
call compiles for a minute or two, and in inference beside OpenVINO. Training is in bf16 autocast
but for the small ResNets. So is converted inference, from float32 weights; its baselines get
weights in bf16, which spares them autocast's casts, torch.compile freezes them too, and OpenVINO
has the latency hint: on two cores its throughput hint gave ResNet-50 the same speed, within 1 %.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracles import torchvision
from torch import Tensor, nn

import fastcnn
from fastcnn.lab import eager_twin, kept_for_backward

# In torch.compile's own code, and in OpenVINO's.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet20": partial(fastcnn.create_model, "resnet20", num_classes=10),
    "resnet50": torchvision.models.resnet50,
    "unet": partial(fastcnn.create_model, "unet", num_classes=2),
}


class Training(NamedTuple):
    """What is trained, how, and beside what."""

    name: str
    batch: int
    size: int
    dtype: torch.dtype | None = torch.bfloat16  # of autocast
    memory: Any = "default"
    compiled: bool = False  # beside torch.compile as well


TRAINING = {
    "resnet20-32px-fp32": Training("resnet20", 128, 32, None),
    "resnet18-224px-fp32": Training("resnet18", 8, 224, None),
    "resnet50-224px-bf16": Training("resnet50", 16, 224, compiled=True),
    "resnet50-224px-bf16-low": Training("resnet50", 16, 224, memory="low"),
    "resnet50-224px-bf16-lowest": Training("resnet50", 16, 224, memory="lowest"),
    "unet-256px-bf16": Training("unet", 4, 256, compiled=True),
}
INFERENCE = {
    "resnet50-224px-inference": ("resnet50", (16, 3, 224, 224)),
    "unet-256px-inference": ("unet", (4, 3, 256, 256)),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_step(compare: Any, benchmark: Any, case: str) -> None:
    name, batch, size, dtype, memory, compiled = TRAINING[case]
    torch.manual_seed(0)
    model = MODELS[name]().to(memory_format=torch.channels_last)
    ours = fastcnn.convert(model, memory=memory)
    eager = eager_twin(ours)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        n, classes, *image = eager(x).shape
    labels = torch.randint(classes, (n, *image))

    def loss(model: Any) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = model(x)
        return F.cross_entropy(y.float(), labels)

    def kept(model: nn.Module) -> int:
        weights = [*model.parameters(), *model.buffers()]
        return kept_for_backward(lambda: loss(model), exclude=weights)

    def step(model: Any) -> Callable[[Any], None]:
        def run(_: Any) -> None:
            model.zero_grad()
            loss(model).backward()

        return run

    benchmark.extra_info["activation_memory_ratio"] = kept(ours) / kept(eager)
    others = {"eager": step(eager)}
    if compiled:
        others["compiled"] = step(torch.compile(eager))
    compare(step(ours), others, [None], 0, x)


def openvino(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One synchronous call on all cores."""
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install .[bench]")
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    found = ov.convert_model(plain, example_input=x.contiguous(), input=list(x.shape))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    compiled = ov.Core().compile_model(found, "CPU", options)
    request, image = compiled.create_infer_request(), x.contiguous().numpy()
    return lambda: request.infer({0: image}, share_inputs=True, share_outputs=True)


@pytest.mark.parametrize("case", INFERENCE)
def test_inference(compare: Any, case: str) -> None:
    name, size = INFERENCE[case]
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(memory_format=torch.channels_last)
    ours = fastcnn.convert(model, mode="infer")
    x = torch.randn(size).to(memory_format=torch.channels_last)
    eager = eager_twin(ours)
    latency = openvino(eager, x)
    half = eager.bfloat16()
    compiled = torch.compile(copy.deepcopy(half), options={"freezing": True})

    def autocast(_: Any) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return ours(x)

    def run(model: Any) -> Callable[[Any], Tensor]:
        def call(_: Any) -> Tensor:
            with torch.no_grad():
                return model(x.bfloat16())

        return call

    others = {"eager": run(half), "compiled": run(compiled), "OpenVINO": lambda _: latency()}
    compare(autocast, others, [None], 0, x)

"""Whole networks through fastcnn.convert: a training step, and inference; images a second.

torchvision's ResNets and this package's ResNet-20 and U-Net (64 channels, 4 levels, bilinear), in
channels_last, vs. themselves unconverted ("eager"), and vs. torch.compile of that, whose
first call compiles for a minute or two. Training is in bf16 autocast but for the small ResNets.

On the CPU converted inference is in bf16 autocast from float32 weights; its baselines get weights
in bf16, which spares them autocast's casts, torch.compile freezes them too, and OpenVINO has the
latency hint: on two cores its throughput hint gave ResNet-50 the same speed, within 1 %.

On a GPU all get weights in bf16 in inference, and ours and eager are captured in a CUDA graph as
well; FASTCNN_BENCH=all adds torch.compile with CUDA graphs and with its longest search.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from candidates import Graph, compiled
from support.oracles import torchvision
from torch import Tensor, nn
from where import ALL, DEVICE, ON_GPU, TINY, cases, on, tiny

import fastcnn
from fastcnn.lab import eager_baseline, saved_for_backward

# In torch.compile's own code, and in OpenVINO's.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet20": partial(fastcnn.create_model, "resnet20", num_classes=10),
    "resnet50": torchvision.models.resnet50,
    "unet": partial(fastcnn.create_model, "unet", num_classes=2),
}
if TINY:
    bottleneck = torchvision.models.resnet.Bottleneck
    MODELS["resnet50"] = partial(
        torchvision.models.ResNet, bottleneck, [1, 1, 1, 1], width_per_group=8
    )
    MODELS["unet"] = partial(fastcnn.create_model, "unet", num_classes=2, depth=2, width=8)


class Training(NamedTuple):
    """What is trained, how, and beside what."""

    name: str
    batch: int
    size: int
    dtype: torch.dtype | None = torch.bfloat16  # of autocast
    memory: Any = "default"
    compiled: bool = False  # vs. torch.compile as well


TRAINING = {
    "resnet20-32px-fp32": Training("resnet20", 128, 32, None),
    "resnet18-224px-fp32": Training("resnet18", on(8, 256), 224, None),
    "resnet50-224px-bf16": Training("resnet50", on(16, 256), 224, compiled=True),
    "resnet50-224px-bf16-full": Training("resnet50", on(16, 256), 224, memory="full"),
    "resnet50-224px-bf16-low": Training("resnet50", on(16, 256), 224, memory="low"),
    "resnet50-224px-bf16-lowest": Training("resnet50", on(16, 256), 224, memory="lowest"),
    # Of compiling on a GPU, half a minute each, one must do in three minutes.
    "unet-256px-bf16": Training("unet", on(4, 32), 256, compiled=ALL or not ON_GPU),
}
TRAINING_ON_GPU = list(TRAINING)[2:]


class Inference(NamedTuple):
    """What is run, and beside what."""

    name: str
    batch: int
    size: int
    compiled: bool = True


INFERENCE = {
    "resnet50-224px-inference": Inference("resnet50", on(16, 256), 224),
    "unet-256px-inference": Inference("unet", on(4, 32), 256, ALL or not ON_GPU),
}
if ON_GPU:  # where launches are all
    INFERENCE["resnet50-224px-inference-b1"] = Inference("resnet50", 1, 224)
INFERENCE_ON_GPU = list(INFERENCE)[:2]

Run = Callable[[Any], object]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(DEVICE, memory_format=torch.channels_last)


def graphs(runs: dict[str, Run]) -> dict[str, Run]:
    """Return them each as a CUDA graph, on a GPU."""
    return {f"{name}, graph": Graph(partial(run, None)) for name, run in runs.items() if ON_GPU}


def compilers(model: nn.Module, wanted: bool, **options: Any) -> dict[str, Any]:
    """Return torch.compile's ways by name; options are those of its default mode."""
    if not wanted:
        return {}
    ways = {"compiled": compiled(model, options=options or None)}
    if ON_GPU and ALL:
        for name, more in (
            ("compiled, graph", {"triton.cudagraphs": True}),
            ("compiled, searched", {"max_autotune": True}),
        ):
            ways[name] = compiled(copy.deepcopy(model), options={**options, **more})
    return ways


@pytest.mark.parametrize("case", cases(TRAINING, TRAINING_ON_GPU))
def test_training_step(compare: Any, case: Training) -> None:
    name, dtype, memory = case.name, case.dtype, case.memory
    (batch,), (size,) = tiny(case.batch, most=2), tiny(case.size, most=32)
    ours = fastcnn.convert(network(name), memory=memory)
    eager = eager_baseline(ours)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        n, classes, *image = eager(x).shape
    labels = torch.randint(classes, (n, *image), device=DEVICE)

    def loss(model: Any) -> Tensor:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            y = model(x)
        return F.cross_entropy(y.float(), labels)

    def kept(model: nn.Module) -> int:
        weights = [*model.parameters(), *model.buffers()]
        return saved_for_backward(lambda: loss(model), exclude=weights)

    def step(model: Any) -> Run:
        def run(_: Any) -> None:
            model.zero_grad()
            loss(model).backward()

        return run

    others = {"eager": step(eager)}
    captured = graphs({"ours": step(ours), **others})
    more = {name: run for name, run in captured.items() if name.startswith("ours")}
    compiled_ones = compilers(eager, case.compiled)
    others |= {name: step(model) for name, model in compiled_ones.items()}
    others |= {name: run for name, run in captured.items() if name not in more}
    compare(
        step(ours), others, [None], 0, x, more, batch, whole=True,
        kept_ratio=kept(ours) / kept(eager),
    )  # fmt: skip


def openvino(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One synchronous call on all cores."""
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install .[bench]")
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    found = ov.convert_model(plain, example_input=x.contiguous(), input=list(x.shape))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    compiled = ov.Core().compile_model(found, "CPU", options)
    request, image = compiled.create_infer_request(), x.contiguous().numpy()
    return lambda: request.infer({0: image}, share_inputs=True, share_outputs=True)


@pytest.mark.parametrize("case", cases(INFERENCE, INFERENCE_ON_GPU))
def test_inference(compare: Any, case: Inference) -> None:
    (batch,), (size,) = tiny(case.batch, most=2), tiny(case.size, most=32)
    dtype = on(torch.float32, torch.bfloat16)
    model = network(case.name).eval().to(dtype)
    ours = fastcnn.convert(model, mode="infer")
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    x = x.to(dtype, memory_format=torch.channels_last)
    eager = eager_baseline(ours)
    latency = {} if ON_GPU else {"OpenVINO": openvino(eager, x)}
    half = eager.bfloat16()

    def run(model: Any) -> Run:
        def call(_: Any) -> Tensor:
            with torch.no_grad():
                return model(x.bfloat16())

        return call

    def autocast(_: Any) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return ours(x)

    others: dict[str, Run] = {"eager": run(half)}
    own = on(autocast, run(ours))
    captured = graphs({"ours": own, **others})
    for name, one in compilers(copy.deepcopy(half), case.compiled, freezing=True).items():
        others[name] = run(one)
    others |= {name: lambda _, one=one: one() for name, one in latency.items()}
    more = {name: one for name, one in captured.items() if name.startswith("ours")}
    others |= {name: one for name, one in captured.items() if name not in more}
    compare(own, others, [None], 0, x, more, batch, whole=True)

"""What the kernels' figures let expect of whole networks: a training step in bf16 on a H200.

Each operation takes the longer of its arithmetic on tensor cores and its bytes at the share of the
copy that its kernel's code lets expect; a step is their sum, without the host, gaps between kernels
and the optimizer. Convolutions are cuDNN's, of whose rates TENSOR_CORES and CUDNN_MEMORY are
guesses from what is published of them, as their code is not read here. Norms, activations and
residual additions are this package's passes, with memory="full". The first step on a GPU says by
how much all this is wrong.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gpu_static.kernels import COPY, Row

TENSOR_CORES = 600e12  # operations a second that a large convolution in bf16 reaches
CUDNN_MEMORY = 0.85  # of the copy, convolutions that memory bounds, depthwise ones too
PYTORCH = 0.85  # of the copy, PyTorch's poolings, concatenations and additions
ELEMENT = 2  # bytes
Share = Callable[[str], float]  # of the copy, by a kernel's name


@dataclass(frozen=True)
class Part:
    """An operation of a step, forward or backward."""

    kind: str  # of operation
    seconds: float
    bound: str  # "tensor cores" or "memory"


def convolution(conv: nn.Conv2d, x: torch.Size, y: torch.Size, first: bool) -> Iterator[Part]:
    """Forward, and both gradients; that of the image is not asked for."""
    image, out, weight = x.numel(), y.numel(), conv.weight.numel()
    depthwise = conv.groups == conv.in_channels > 1  # this package's kernels, without tensor cores
    flops = 0 if depthwise else 2 * out * weight // conv.out_channels
    arithmetic = flops / TENSOR_CORES
    moved = ELEMENT * (image + out + weight) / (CUDNN_MEMORY * COPY)
    kind = "depthwise convolution" if depthwise else "convolution"
    bound = "tensor cores" if arithmetic > moved else "memory"
    for wanted in (True, not first, True):
        if wanted:
            yield Part(kind, max(arithmetic, moved), bound)


def passes(kind: str, image: int, share: Share, **of_kernels: int) -> Iterator[Part]:
    """Passes over an image, so many by each kernel."""
    for kernel, count in of_kernels.items():
        yield Part(kind, count * ELEMENT * image / (share(kernel) * COPY), "memory")


def parts(model: nn.Module, sizes: tuple[int, ...], share: Share) -> Iterator[Part]:
    """Yield what a step of a network consists of."""
    graph = fx.symbolic_trace(model)
    shapes = shapes_of(graph, sizes)
    modules = dict(graph.named_modules())
    first = True
    for node in graph.graph.nodes:
        y = shapes.get(node)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if y is None or node.op in ("placeholder", "output"):
            continue
        if isinstance(module, nn.Conv2d):
            yield from convolution(module, shapes[node.args[0]], y, first)
            first = False
        elif isinstance(module, nn.BatchNorm2d):
            yield from passes(
                "batch norm and activation", y.numel(), share,
                batch_norm_act_stats=1, batch_norm_act_apply=2, batch_norm_act_reduce=2,
                batch_norm_act_dx=3,
            )  # fmt: skip
        elif node.target in (operator.add, operator.iadd, torch.add):
            # Read by the batch norm's passes forward and backward, whose sums write dz; then the
            # two gradients are added.
            yield from passes(
                "residual", y.numel(), share,
                batch_norm_act_apply=1, batch_norm_act_reduce=2, pytorch=3,
            )  # fmt: skip
        elif fused(module, node):
            continue
        else:
            read = sum(shapes[a].numel() for a in node.all_input_nodes if a in shapes)
            yield from passes("pooling and others", read + y.numel(), share, pytorch=2)


def fused(module: nn.Module | None, node: fx.Node) -> bool:
    """Whether a batch norm's passes do it, or it is a view."""
    activations = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Identity, nn.Dropout, nn.Flatten)
    return isinstance(module, activations) or node.target in (torch.flatten, getattr)


def shapes_of(graph: fx.GraphModule, sizes: tuple[int, ...]) -> dict[fx.Node, torch.Size]:
    """Return the sizes of every tensor, computed without data."""
    found: dict[fx.Node, torch.Size] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                found[n] = value.shape
            return value

    with torch.no_grad():
        Shapes(graph.to("meta")).run(torch.empty(sizes, device="meta"))
    return found


@dataclass(frozen=True)
class Step:
    """A network's training step."""

    name: str
    images: int
    parts: list[Part]

    @property
    def seconds(self) -> float:
        """Of all its parts."""
        return sum(part.seconds for part in self.parts)

    def share_of(self, bound: str) -> float:
        """The share of the step that something bounds."""
        return sum(part.seconds for part in self.parts if part.bound == bound) / self.seconds

    def by_kind(self) -> list[tuple[str, float]]:
        """Return the seconds of each kind of operation, the longest first."""
        sums: dict[str, float] = {}
        for part in self.parts:
            sums[part.kind] = sums.get(part.kind, 0.0) + part.seconds
        return sorted(sums.items(), key=lambda item: -item[1])


def steps(rows: Sequence[Row]) -> list[Step]:
    """Return ResNet-50's, EfficientNet-B0's and U-Net's, from the figures of all kernels."""
    from support.oracles import torchvision

    from fastcnn import create_model, revert

    shares = {row.name: row.share_of_copy for row in rows if row.kind == "walks"}

    def share(kernel: str) -> float:
        return (
            PYTORCH if kernel == "pytorch" else shares[f"{kernel}_kernel<__nv_bfloat16, 8, true>"]
        )

    networks = {
        "ResNet-50": (torchvision.models.resnet50(), 256, 224),
        "EfficientNet-B0": (torchvision.models.efficientnet_b0(), 256, 224),
        "U-Net": (revert(create_model("unet", num_classes=2)), 32, 256),
    }
    return [
        Step(name, batch, list(parts(model, (batch, 3, side, side), share)))
        for name, (model, batch, side) in networks.items()
    ]

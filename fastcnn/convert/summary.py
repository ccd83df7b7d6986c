"""What a model's conversion comes to, and what would make it faster: the head of report()."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastcnn.convert.converted import Converted
from fastcnn.convert.graph.layers import CONVS
from fastcnn.convert.options import Options
from fastcnn.convert.parts import Parts
from fastcnn.convert.rows import ConversionRow, left
from fastcnn.ops.conv_bn_act.step import level_on
from fastcnn.plan.problem import bfloat16_instructions


class Hint(NamedTuple):
    """Something that gains speed: the code that does it, and why it does."""

    code: str
    why: str


class Summary(NamedTuple):
    """The head of a report."""

    verdict: str
    state: str
    hints: list[Hint]

    def lines(self) -> Iterator[str]:
        """Yield it as text."""
        yield self.verdict
        yield self.state
        if self.hints:
            yield "faster still:"
        for hint in self.hints:
            yield f"  {hint.code}"
            yield f"      {hint.why}"


def summary_of(model: nn.Module, parts: Parts, found: Sequence[ConversionRow]) -> Summary:
    """Sum up a model whose modules are converted so."""
    fused = [row for row in found if row.fused]
    could = [*fused, *left(found)]
    options = {m._fastcnn_conversion.options for m in model.modules() if isinstance(m, Converted)}
    modes = {o.mode for o in options}
    in_infer = "infer" not in modes and infer_fuses(parts)
    name, layouts = type(model).__name__, _layouts(model)
    if not could:
        verdict = f"{name}: nothing in it is convertible"
        verdict += ' with mode="train"' if in_infer else ""
    elif not options:
        verdict = f"{name} is not converted: {_places(len(could))} could run fused"
    else:
        backends = ", ".join(dict.fromkeys(row.backend for row in fused))
        verb = "runs" if len(could) == 1 else "run"
        verdict = f"{name}: {len(fused)} of {_places(len(could))} {verb} fused"
        verdict += f", by {backends}" if fused else ""
    kinds = sorted({p.device.type for p in model.parameters()})
    said = [f'mode="{o.mode}", {_memory(o, kinds)}' for o in sorted(options, key=repr)]
    weights = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in weights})
    devices = sorted({p.device.type for p in weights})
    facts = [" and ".join(of) for of in (said, dtypes, layouts, devices) if of]
    facts.append("in training" if model.training else "in evaluation")
    state = ", ".join(facts)
    hints = [*_of_conversion(model, parts, modes, len(could), in_infer)]
    if could and _has(parts, *CONVS):
        hints += _of_calls(model, layouts)
    return Summary(verdict, state, hints)


def _memory(options: Options, devices: Sequence[str]) -> str:
    levels = {level_on(device, options.memory) for device in devices}
    which = f" ({', '.join(sorted(levels))})" if options.memory == "auto" and levels else ""
    return f'memory="{options.memory}"{which}'


def _places(count: int) -> str:
    return f"{count} place" if count == 1 else f"{count} places"


def _layouts(model: nn.Module) -> list[str]:
    """Return the layouts of the convolutions' weights; a 1x1 kernel of one channel is in both."""
    names = set()
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.groups == 1:
            nchw = m.weight.is_contiguous()
            last = m.weight.is_contiguous(memory_format=torch.channels_last)
            if nchw != last:
                names.add("NCHW" if nchw else "channels_last")
    return sorted(names)


def infer_fuses(parts: Parts) -> bool:
    """Whether mode="infer" alone fuses something: convolutions that have no batch norm.

    Of a model with batch norms it is not said: there it folds them, which is more.
    """
    return not _has(parts, "batch_norm") and any(part.in_infer for part in parts.values())


def _of_conversion(
    model: nn.Module, parts: Parts, modes: set[str], could: int, in_infer: bool
) -> Iterator[Hint]:
    """Yield what another conversion would gain."""
    infer = 'fastcnn.convert(model, mode="infer")'
    if not modes and could:
        yield Hint("fastcnn.convert(model)", "runs them fused, in place; fastcnn.revert undoes it")
    if in_infer:
        yield Hint(infer, "for inference: fuses convolutions without a batch norm with activations")
    elif modes == {"train"} and not model.training and _has(parts, "batch_norm"):
        yield Hint(
            infer, "folds each batch norm into its convolution's weights, once for all calls"
        )


def _of_calls(model: nn.Module, layouts: list[str]) -> Iterator[Hint]:
    """Yield what another layout, type or way of calling would gain."""
    if "NCHW" in layouts:
        yield Hint(
            "model.to(memory_format=torch.channels_last), and the images alike",
            "convolutions run in channels_last: from NCHW each copies its input and its output",
        )
    device, half = _device_with_bfloat16(model)
    if half:
        yield Hint(
            f'with torch.autocast("{device}", torch.bfloat16)',
            "this device multiplies bfloat16 by instructions of its own, and it is half the bytes",
        )
    asks = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    if not model.training and asks:
        yield Hint(
            "with torch.no_grad()",
            "evaluation saves no activations for backward then, and folds batch norms into weights",
        )


def _has(parts: Parts, *kinds: str) -> bool:
    return any(part.layer.kind in kinds for part in parts.values())


def _device_with_bfloat16(model: nn.Module) -> tuple[str, bool]:
    """Return where a float32 model is, and whether bfloat16 is multiplied there natively."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or weight.dtype != torch.float32:
        return "", False
    if weight.device.type == "cuda":
        return "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    return weight.device.type, weight.device.type == "cpu" and bool(bfloat16_instructions())

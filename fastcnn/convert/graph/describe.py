"""Patterns in words, for report() and verify()."""

from typing import NamedTuple

from torch import fx, nn

from fastcnn.convert.graph.matcher import Matcher
from fastcnn.convert.graph.patterns import (
    ChainPattern,
    DropPattern,
    LayerPattern,
    LinearPattern,
    Pattern,
    ResizePattern,
    SqueezePattern,
    StepNodes,
)


class Call(NamedTuple):
    """A fused call: where it is, what it is made of, and the node whose value it gives."""

    where: str
    words: str
    last: str
    ends_in: nn.Module | None  # by which fit.notes names it
    layers: dict[str, str]  # paths, by what conv_bn_act's errors call its steps
    reads: tuple[str, ...]  # the paths of the layers that read its first input


def describe(pattern: Pattern, matcher: Matcher) -> Call:
    """Return a pattern's call: where it is by its first module and its last."""
    layers = [str(n.target) for n in pattern.nodes if n.op == "call_module"]
    where = (
        " .. ".join(dict.fromkeys((layers[0], layers[-1]))) if layers else _owned(pattern.nodes[0])
    )
    ends_in, reads = None, []
    paths: dict[str, str] = {}
    if isinstance(pattern, ChainPattern):
        step = pattern.steps[-1]
        ends_in = matcher.module(step.conv if step.bn is None else step.bn)
        shortcut = pattern.residual if isinstance(pattern.residual, tuple) else ()
        for prefix, steps in (("", pattern.steps), ("shortcut: ", shortcut)):
            paths |= {f"{prefix}step {i}": str(s.conv.target) for i, s in enumerate(steps)}
            reads += [] if pattern.resize else [str(s.conv.target) for s in steps[:1]]
    elif isinstance(pattern, LayerPattern):
        ends_in = matcher.module(pattern.layer)
        reads = [] if pattern.pieces else [str(pattern.layer.target)]
    elif isinstance(pattern, DropPattern) and layers:
        ends_in = matcher.module(pattern.drop)
    elif isinstance(pattern, ResizePattern) and layers:
        ends_in = matcher.module(pattern.resize)
    elif isinstance(pattern, SqueezePattern):
        ends_in = matcher.module(pattern.fc2 or pattern.fc1)
    elif isinstance(pattern, LinearPattern):
        ends_in = matcher.module(pattern.steps[-1][0])
        reads = [str(pattern.steps[0][0].target)]
    words, last = _words(pattern, matcher), matcher.last_of(pattern).name
    return Call(where, words, last, ends_in, paths, tuple(reads))


def call_of_blocks(calls: list[Call]) -> Call:
    """Return the call of residual blocks that run as one."""
    first, last = calls[0], calls[-1]
    words = f"{len(calls)} blocks: " + ", ".join(call.words for call in calls)
    layers = {
        f"block {i}: {step}": path
        for i, call in enumerate(calls)
        for step, path in call.layers.items()
    }
    where = f"{first.where} .. {last.where}"
    return last._replace(where=where, words=words, layers=layers, reads=first.reads)


class Left(NamedTuple):
    """Something convertible that is not fused: where it is, what, and why not."""

    where: str
    words: str
    why: str


def describe_left(node: fx.Node, why: str, matcher: Matcher) -> Left:
    """Return what a node is that is left alone."""
    if node.op == "call_module":
        return Left(str(node.target), matcher.layer(node).kind or "call", why)
    words = node.target if isinstance(node.target, str) else node.target.__name__
    return Left(_owned(node), words, why)


def _owned(node: fx.Node) -> str:
    """Return the name of a function's call, within the module whose forward it is in."""
    owner = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
    return f"{owner}.{node.name}" if owner else node.name


def _words(p: Pattern, matcher: Matcher) -> str:
    if isinstance(p, ChainPattern):
        *before, last = [_step(step) for step in p.steps]
        if p.resize is not None:
            before.insert(0, "interpolate" if p.resize.skip is None else "interpolate-cat")
        if p.residual is None:
            return " > ".join([*before, last])
        beside = {fx.Node: "residual", tuple: "projection"}.get(type(p.residual), "residual")
        beside = "identity" if p.residual == () else beside
        act = p.steps[-1].act
        conv = "conv" if p.steps[-1].bn is None else "conv-bn"
        return " > ".join([*before, f"{conv} + {beside}" + (f" - {act}" if act != "none" else "")])
    if isinstance(p, LayerPattern):
        kind = ("cat-" if p.pieces else "") + str(matcher.layer(p.layer).kind)
        added = " + residual" if p.residual is not None else ""
        return f"{kind}{added}" + (f"-{p.act}" if p.act != "none" else "")
    if isinstance(p, ResizePattern):
        by_layer = p.skip is None and p.resize.op == "call_module"
        return "upsample" if by_layer else "interpolate" if p.skip is None else "interpolate-cat"
    if isinstance(p, SqueezePattern):
        return "squeeze_excite" + (f"-{p.act}" if p.act != "none" else "") + f"-{p.gate}"
    if isinstance(p, LinearPattern):
        return " > ".join("linear" + (f"-{act}" if act != "none" else "") for _, act in p.steps)
    assert isinstance(p, DropPattern)
    return "dropout"


def _step(step: StepNodes) -> str:
    act = f"-{step.act}" if step.act != "none" else ""
    conv = "conv" if step.bn is None else "conv-bn"
    return conv + act + ("-pool" if step.pool is not None else "")

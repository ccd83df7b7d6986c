"""A converted module's graph before and after fusing, taken apart for report() and verify()."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx, nn

from fastcnn.convert.codegen import runtime
from fastcnn.convert.codegen.rewrite import fuse
from fastcnn.convert.converted import Conversion, as_original, match
from fastcnn.convert.graph.describe import describe
from fastcnn.convert.graph.patterns import Chain, Matcher, Norm, Pattern
from fastcnn.convert.graph.trace import trace

# Where the functions are that fused graphs call.
_OURS = ("fastcnn.convert.codegen.runtime", "fastcnn.convert.codegen.folded")


class Call(NamedTuple):
    """A fused call: where it is, what it is made of, and the node whose value it gives."""

    where: str
    words: str
    last: str
    ends_in: nn.Module | None  # by which runtime.notes names it


class Unit(NamedTuple):
    """What a module's forward is, as it is written and fused, for its training flags of now."""

    original: fx.Graph
    fused: fx.Graph
    calls: dict[str, Call]  # by the fused graph's nodes


def unit(module: nn.Module, conversion: Conversion) -> Unit:
    """Trace and fuse a converted module once more, as its plan was made.

    Raises:
        Untraceable: it cannot be traced now.
    """
    leaves = {module.get_submodule(path) for path in conversion.leaves}
    with as_original(list(module.modules())):
        graph = trace(module, leaves).graph
        original = copy.deepcopy(graph)
        modules, _, matcher, found = match(graph, module, conversion.options)
        made = [_call(p, matcher, modules) for p in found]
        fuse(graph, matcher, found, conversion.options)
    return Unit(original, graph, _by_node(graph, made))


def _call(pattern: Pattern, matcher: Matcher, modules: dict[str, nn.Module]) -> Call:
    last = None
    if isinstance(pattern, Chain):
        step = pattern.steps[-1]
        last = matcher.module(step.conv if step.bn is None else step.bn)
    elif isinstance(pattern, Norm):
        last = matcher.module(pattern.norm)
    return Call(*describe(pattern, modules), matcher.last_of(pattern).name, last)


def _by_node(graph: fx.Graph, made: Sequence[Call]) -> dict[str, Call]:
    """Give each call its node: both are in the order of the patterns' last nodes."""
    waiting = list(made)
    found: dict[str, Call] = {}
    for node in graph.nodes:
        if node.target is runtime.conv_bn_act_blocks:
            joined = [waiting.pop(0) for _ in node.args[1]]
            words = f"{len(joined)} blocks: " + ", ".join(call.words for call in joined)
            where = " .. ".join((joined[0].where, joined[-1].where))
            found[node.name] = joined[-1]._replace(where=where, words=words)
        elif getattr(node.target, "__module__", "") in _OURS:
            found[node.name] = waiting.pop(0)
    assert not waiting
    return found

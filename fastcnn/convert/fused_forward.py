"""A module's forward, traced and fused for its training flags as they are.

With it comes what report() and verify() need: the graph as it is written, the graph that runs, and
what its fused calls are made of. Nothing is traced or asked a second time; the graphs of a resnet50
take 3.5 MB.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx, nn

from fastcnn.convert.codegen.rewrite import comparison_of, drop_identities, function_of, fuse
from fastcnn.convert.graph.describe import Call, Left, call_of_blocks, describe, describe_left
from fastcnn.convert.graph.guards import Guard, compared_compiled
from fastcnn.convert.graph.layers import Layers
from fastcnn.convert.graph.matcher import Matcher
from fastcnn.convert.graph.trace import trace
from fastcnn.convert.options import Options


class FusedForward(NamedTuple):
    """What runs in place of a forward, as long as the training flags that it has read are these."""

    run: Callable[..., Any]
    flags: list[tuple[weakref.ref[nn.Module], bool]]
    guard: Guard
    holds: Callable[[Any], bool]  # the guard, as far as torch.compile needs to see it
    original: fx.Graph  # as it is written
    fused: fx.Graph  # as it runs
    calls: dict[str, Call]  # by the fused graph's nodes; residual blocks may be one
    patterns: list[Call]  # in the same order, residual blocks each
    left: list[Left]
    in_infer: bool  # whether mode="infer" would fuse convolutions that this mode leaves alone
    # By paths of the modules that it holds: whether a pattern has a part there.
    opened: dict[str, bool]

    def is_for_flags(self) -> bool:
        """Whether the training flags are those that it was made for."""
        return all(getattr(m(), "training", None) == flag for m, flag in self.flags)

    def children(self) -> list[str]:
        """Return the paths of the modules that it calls."""
        return [str(node.target) for node in self.fused.nodes if node.op == "call_module"]


def trace_and_fuse(
    module: nn.Module, leaves: set[nn.Module], options: Options, name: str, layers: Layers
) -> FusedForward:
    """Trace a module, of its original class as all below it, and fuse what is found.

    Raises:
        Untraceable: the forward cannot be replaced.
    """
    graph, opened, reads = trace(module, leaves, layers)
    opened += [m for m in reads.entered if m not in opened]
    original = copy.deepcopy(graph)
    modules = dict(module.named_modules(remove_duplicate=False))
    dropped = drop_identities(graph, modules, layers)
    folds = options.mode == "infer"
    in_infer = not folds and Matcher(graph, modules, layers, folds=True).has_bare_chains()
    matcher = Matcher(graph, modules, layers, folds)
    found = matcher.match()
    inside = [modules[str(n.target)] for p in found for n in p.nodes if n.op == "call_module"]
    consumed = {m: None for layer in (*inside, *dropped) for m in layer.modules()}
    stacks = [n.meta.get("nn_module_stack", {}).values() for p in found for n in p.nodes]
    fusing = {path for stack in stacks for path, _ in stack}
    described = {id(p): describe(p, matcher) for p in found}
    left = [describe_left(node, why, matcher) for node, why in matcher.left.items()]
    calls = {}
    for node, together in fuse(graph, matcher, found, options):
        parts = [described[id(p)] for p in together]
        calls[node.name] = parts[0] if len(parts) == 1 else call_of_blocks(parts)
    paths = {m: path for path, m in reversed(modules.items())}
    return FusedForward(
        function_of(graph, name or type(module).__name__),
        [(weakref.ref(m), m.training) for m in reads.flags],
        Guard(opened, consumed, reads, layers),
        comparison_of(
            compared_compiled(opened, consumed, reads, layers), paths, f"comparison of {name}"
        ),
        original,
        graph,
        calls,
        list(described.values()),
        left,
        in_infer,
        {paths[m]: paths[m] in fusing for m in opened},
    )

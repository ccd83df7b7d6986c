"""Which nodes of a graph may share memory, and which of them write into it.

A fused call stands where its last node stood, and reads its inputs there. Between its first node
and its last, nobody else may write into those inputs; what is unknown counts as sharing and
writing.
"""

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastcnn.convert.graph.layers import Layers, called

# Functions whose result is always memory of its own.
_FRESH: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.matmul,
    torch.add, torch.sub, torch.mul, torch.cat, torch.concat, torch.matmul, torch.sigmoid,
    F.interpolate, F.max_pool2d, F.conv2d, F.linear, F.softmax, F.batch_norm,
    "add", "sub", "mul", "mean", "sum", "size", "softmax", "sigmoid",
}  # fmt: skip
_KEEPING_NOTHING = {"torch", "_operator", "builtins", "math"}  # packages of functions
_WRITING_OPERATORS = {
    getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
        "ilshift", "irshift", "imatmul", "setitem", "delitem",
    )
}  # fmt: skip


def arguments(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among a node's arguments."""
    return list(node.all_input_nodes)


class Aliasing:
    """Answers for one graph."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], layers: Layers) -> None:
        self._modules, self._layers = modules, layers
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._nodes = list(graph.nodes)

    @functools.cached_property
    def _roots(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """The nodes whose memory each may share: most graphs are not asked, transformers' never."""
        roots: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self._nodes:
            below = [] if self._is_fresh(node) else arguments(node)
            roots[node] = frozenset([node]).union(*(roots[n] for n in below))
        return roots

    @functools.cached_property
    def _sharing(self) -> dict[fx.Node, list[fx.Node]]:
        """By root: the nodes that may share its memory, in the order of the graph."""
        sharing: dict[fx.Node, list[fx.Node]] = {}
        for node, roots in self._roots.items():
            for root in roots:
                sharing.setdefault(root, []).append(node)
        return sharing

    def shares(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes' values may be in the same memory."""
        return not self._roots[a].isdisjoint(self._roots[b])

    def written(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes into whose memory a node may write."""
        module = called(node, self._modules)
        if module is not None:
            if not self._layers[module].leaf:
                return arguments(node)  # somebody's own, not traced
            return arguments(node)[:1] if getattr(module, "inplace", False) else []
        if node.op not in ("call_function", "call_method"):
            return []
        if "out" in node.kwargs:
            return arguments(node)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        in_place = name.endswith("_") and not name.endswith("__")
        # relu(x, True), dropout(x, 0.5, True, True): which of them is "inplace" is not looked up.
        flags = [node.kwargs.get("inplace"), *node.args[1:]]
        if in_place or node.target in _WRITING_OPERATORS or any(f is True for f in flags):
            return arguments(node)[:1]
        return []

    def writer_between(
        self, first: fx.Node, last: fx.Node, inputs: Iterable[fx.Node], inside: set[fx.Node]
    ) -> fx.Node | None:
        """Return a node from first to last, not inside, that may write into one of the inputs."""
        read = list(inputs)
        for node in self._nodes[self._order[first] : self._order[last]]:
            if node in inside:
                continue
            for target in self.written(node):
                if any(self.shares(target, n) for n in read):
                    return node
        return None

    def dies_at(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether nobody sees a value's memory after a node: within the graph, or its caller."""
        at = self._order[node]
        others = {other for root in self._roots[value] for other in self._sharing[root]}
        for other in others:
            if self._order[other] < at and (
                other.op in ("placeholder", "get_attr")
                or any(self._order[user] > at or self._may_keep(user) for user in other.users)
            ):
                return False
        return True

    def in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Return nodes as they follow each other."""
        return sorted(nodes, key=self._order.__getitem__)

    def first_of(self, nodes: Iterable[fx.Node]) -> fx.Node:
        """Return the node that comes first."""
        return min(nodes, key=self._order.__getitem__)

    def last_of(self, nodes: Iterable[fx.Node]) -> fx.Node:
        """Return the node that comes last."""
        return max(nodes, key=self._order.__getitem__)

    def _may_keep(self, node: fx.Node) -> bool:
        """Whether a node calls code of somebody's own, which may keep its input for itself."""
        module = called(node, self._modules)
        if module is not None:
            return not self._layers[module].leaf
        where = getattr(node.target, "__module__", None) or "torch"
        return node.op == "call_function" and where.split(".")[0] not in _KEEPING_NOTHING

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return True
        module = called(node, self._modules)
        if module is None:
            return node.target in _FRESH
        layer = self._layers[module]
        if layer.kind in (None, "identity", "dropout", "upsample"):
            known = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
            return known and layer.leaf
        return not getattr(module, "inplace", False)

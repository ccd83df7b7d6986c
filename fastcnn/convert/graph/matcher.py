"""Finds the patterns of a graph: squeezes, chains, layers, resizings, dropouts, linear layers."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastcnn.convert.graph.aliasing import Aliasing
from fastcnn.convert.graph.layers import (
    CONVS,
    DEPTHWISE,
    NORMS,
    RESIZES,
    Layer,
    Layers,
    act_of_function,
    called,
    padding_without_kernel,
)
from fastcnn.convert.graph.patterns import (
    INTERPOLATE,
    ChainPattern,
    DropPattern,
    LayerPattern,
    LinearPattern,
    Pattern,
    ResizePattern,
    SqueezePattern,
    StepNodes,
)

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE_ADDS = {operator.iadd, "add_"}
_NORM_FUNCTIONS = {F.batch_norm, F.group_norm, F.instance_norm}
_SINGLE = (*NORMS, DEPTHWISE)
_MULS = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"}
_CATS = {torch.cat, torch.concat, torch.concatenate}


class Matcher:
    """Finds the patterns of one graph; `left` says of the other convertible nodes why not."""

    def __init__(
        self, graph: fx.Graph, modules: dict[str, nn.Module], layers: Layers, folds: bool = False
    ) -> None:
        self._graph, self._modules, self._layers, self._folds = graph, modules, layers, folds
        self._aliasing = Aliasing(graph, modules, layers)
        self._used: set[fx.Node] = set()
        self.left: dict[fx.Node, str] = {}

    def match(self) -> list[Pattern]:
        """Return the patterns, in the order of their last nodes."""
        found: list[Pattern] = []
        finders = (
            self._squeezes, self._chains, self._single, self._resizes, self._drops, self._linears,
        )  # fmt: skip
        for candidates in finders:
            for pattern in candidates():
                if self.may_move([pattern]):
                    self._used.update(pattern.nodes)
                    if isinstance(pattern, LayerPattern) and self._kind(pattern.layer) == DEPTHWISE:
                        self.left.pop(pattern.layer, None)  # why it is in no chain
                    found.append(pattern)
        order = {node: i for i, node in enumerate(self._graph.nodes)}
        self._keep_read_residuals(found, order)
        return sorted(found, key=lambda p: order[self.last_of(p)])

    def _keep_read_residuals(self, found: list[Pattern], order: dict[fx.Node, int]) -> None:
        """Let no chain write into a residual that a call around it reads: each reads at its end."""
        for chain in found:
            if not isinstance(chain, ChainPattern) or not chain.residual_dies:
                continue
            residual: Any = chain.residual or chain.input
            at = order[chain.last]
            chain.residual_dies = not any(
                order[p.nodes[0]] < at < order[self.last_of(p)]
                and any(self._aliasing.shares(residual, n) for n in p.inputs)
                for p in found
            )

    def has_bare_chains(self) -> bool:
        """Whether there is no batch norm, and a convolution is fused with what follows it."""
        if any(self._kind(node) == "batch_norm" for node in self._graph.nodes):
            return False
        self._used.update(node for p in self._squeezes() for node in p.nodes)
        return any(
            len(p.nodes) > 1
            and any(self._kind(step.conv) == "conv" for step in p.steps)
            and self.may_move([p])
            for p in self._chains()
        )

    def nodes_of(self, patterns: Sequence[Pattern]) -> list[fx.Node]:
        """Return the nodes of patterns, as they follow each other."""
        return self._aliasing.in_order({node for p in patterns for node in p.nodes})

    def last_of(self, pattern: Pattern) -> fx.Node:
        """Return where a pattern's call stands."""
        return self._aliasing.last_of(pattern.nodes)

    def may_move(self, patterns: Sequence[Pattern]) -> bool:
        """Whether patterns, each the next one's input, may run where the last of them stands."""
        inside = {node for pattern in patterns for node in pattern.nodes}
        first, last = self._aliasing.first_of(inside), self._aliasing.last_of(inside)
        inputs = [n for pattern in patterns for n in pattern.inputs if n not in inside]
        writer = self._aliasing.writer_between(first, last, inputs, inside)
        if writer is not None:
            self.left[last] = f"{writer.name} may write into its input before it has run"
        return writer is None

    def _kind(self, node: Any) -> str | None:
        module = called(node, self._modules) if isinstance(node, fx.Node) else None
        return None if module is None else self._layers[module].kind

    def module(self, node: fx.Node) -> Any:
        """Return the module that a node calls."""
        return self._modules[str(node.target)]

    def layer(self, node: fx.Node) -> Layer:
        """Return the layer that a node calls."""
        return self._layers[self.module(node)]

    def _act(self, node: fx.Node) -> str | None:
        """Return the activation that a node applies to its only input, if it does."""
        if node.op != "call_module":
            return act_of_function(node)
        layer = self.layer(node)
        return layer.act if layer.kind == "act" and layer.differs is None else None

    def _then(self, node: fx.Node) -> fx.Node | None:
        """Return the one node that takes this one, once, as its first argument."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        inputs = [a for a in (*user.args, *user.kwargs.values()) if isinstance(a, fx.Node)]
        return user if inputs == [node] or user.target in _ADDS else None

    def _act_behind(self, node: fx.Node) -> tuple[str, fx.Node] | None:
        then = self._then(node)
        act = None if then is None else self._act(then)
        return None if then is None or act is None else (act, then)

    # Squeeze-and-excitation

    def _squeezes(self) -> Iterator[SqueezePattern]:
        for node in self._graph.nodes:
            operands = _operands(node) if node.target in _MULS else []
            for x, gate in (operands, operands[::-1]) if operands else ():
                found = self._squeeze(node, x, gate)
                if found is not None:
                    yield found
                    break

    def _squeeze(self, mul: fx.Node, x: fx.Node, gate: Any) -> SqueezePattern | None:
        """Return the pattern of x * gate, walking from the gate to the mean."""
        name = "hardsigmoid" if self._is_hardsigmoid(gate) else self._act_of(gate)
        if name not in ("sigmoid", "hardsigmoid"):
            return None
        nodes, act = [mul, gate], "none"
        fc1, fc2, before = gate.args[0], None, gate.args[0]
        if self._is_fc(fc1):
            before = fc1.args[0]
            nodes.append(fc1)
            behind = self._act_of(before)
            if behind is not None and self._is_fc(before.args[0]):
                act = behind
                nodes.append(before)
                before = before.args[0]
            if self._is_fc(before):
                fc1, fc2 = before, fc1
                nodes.append(fc1)
                before = fc1.args[0]
        dims = self._mean_of(before, x) if len(nodes) > 2 else None
        if dims is None or any(len(n.users) != 1 for n in (*nodes[1:], before)):
            return None
        ends = self.module(fc2 or fc1).out_channels, self.module(fc1).in_channels
        if ends[0] != ends[1]:  # PyTorch would broadcast
            return None
        return SqueezePattern(x, dims, fc1, fc2, act, name, [before, *reversed(nodes)])

    def _act_of(self, node: Any) -> str | None:
        """Return the activation that a node applies, if it does."""
        called = isinstance(node, fx.Node) and node.op.startswith("call") and node.args
        return self._act(node) if called else None

    def _is_hardsigmoid(self, node: fx.Node) -> bool:
        if node.target is F.hardsigmoid:
            return len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
        return self._kind(node) == "hardsigmoid" and self._no_layer(node) is None

    def _is_fc(self, node: Any) -> bool:
        """Whether a node is a 1x1 convolution and nothing else."""
        if self._kind(node) != "conv" or self._no_conv(node) is not None:
            return False
        conv = self.module(node)
        return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == (
            (1, 1), (1, 1), (0, 0), 1,
        )  # fmt: skip

    def _mean_of(self, node: Any, x: fx.Node) -> tuple[int, ...] | None:
        """Return over which dims a node is x's mean, () where it pools; None: it is neither."""
        if not isinstance(node, fx.Node) or not node.args or node.args[0] is not x:
            return None
        if self._kind(node) == "adaptive_pool":
            ones = self.module(node).output_size in (1, (1, 1), [1, 1])
            return () if ones and self._no_layer(node) is None else None
        given = zip(("dim", "keepdim"), node.args[1:], strict=False)
        options: dict[str, Any] = {**dict(given), **node.kwargs}
        if node.target is F.adaptive_avg_pool2d:
            size = options.pop("output_size", options.pop("dim", None))
            return () if size in (1, (1, 1), [1, 1]) and not options else None
        if node.target not in ("mean", torch.mean) or len(node.args) > 3:
            return None
        dim, keeps = options.pop("dim", ()), options.pop("keepdim", False)
        plain = isinstance(dim, (tuple, list)) and not options and keeps is True
        return tuple(dim) if plain and sorted(dim) in ([2, 3], [-2, -1]) else None

    # Chains

    def _chains(self) -> Iterator[ChainPattern]:
        steps = [s for node in self._graph.nodes if (s := self._step(node)) is not None]
        if self._folds:
            taken = {step.conv for step in steps}
            taken |= self._used
            bare = [n for n in self._graph.nodes if self._kind(n) in CONVS and n not in taken]
            steps += [s for node in bare if (s := self._bare_step(node)) is not None]
            order = {node: i for i, node in enumerate(self._graph.nodes)}
            steps.sort(key=lambda step: order[step.conv])
        by_end: dict[fx.Node, ChainPattern] = {}
        for step in steps:  # in the order of the graph, so that what comes before is there
            x: Any = step.conv.args[0]
            before = by_end.get(x)
            if before is not None and self._then(before.last) is step.conv:
                del by_end[before.last]
                before.steps.append(step)
                by_end[step.nodes[-1]] = before
            else:
                by_end[step.nodes[-1]] = ChainPattern([step], self._resize_before(step.conv))
        for node in self._graph.nodes:
            if node.target in _ADDS:
                self._add_to_chain(node, by_end)
        yield from by_end.values()

    def _step(self, bn: fx.Node) -> StepNodes | None:
        if self._kind(bn) != "batch_norm" or not bn.args or self._kind(bn.args[0]) not in CONVS:
            return None
        conv: Any = bn.args[0]
        why = self._no_step(conv, bn)
        if why is not None:
            self.left[conv] = why
            return None
        return self._with_act_and_pool(conv, bn, self.layer(bn).act or "none")

    def _resize_before(self, conv: fx.Node) -> ResizePattern | None:
        """Return what makes a convolution's input, if that can be done on the small image."""
        module, x = self.module(conv), conv.args[0]
        ones = (module.stride, module.padding, module.dilation, module.groups)
        if module.kernel_size != (3, 3) or ones != ((1, 1), (1, 1), (1, 1), 1):
            return None
        if not isinstance(x, fx.Node) or len(x.users) != 1:
            return None
        for node in _two_of(x) or [x]:
            made = self._resize(node)
            if made is not None and made.nodes[-1] is x:
                return made
        return None

    def _bare_step(self, conv: fx.Node) -> StepNodes | None:
        """Return the step of a convolution without a batch norm."""
        return None if self._no_conv(conv) else self._with_act_and_pool(conv, None, "none")

    def _with_act_and_pool(self, conv: fx.Node, bn: fx.Node | None, act: str) -> StepNodes:
        nodes = [conv] if bn is None else [conv, bn]
        behind = self._act_behind(nodes[-1]) if act == "none" else None
        if behind is not None:
            act = behind[0]
            nodes.append(behind[1])
        pool = self._then(nodes[-1])
        if pool is not None and self._kind(pool) == "max_pool" and self._pools(pool):
            return StepNodes(conv, bn, act, (*nodes, pool), pool)
        return StepNodes(conv, bn, act, tuple(nodes))

    def _pools(self, node: fx.Node) -> bool:
        pool = self.module(node)
        plain = pool.dilation in (1, (1, 1)) and not (pool.ceil_mode or pool.return_indices)
        return plain and self.layer(node).differs is None

    def _no_step(self, conv: fx.Node, bn: fx.Node) -> str | None:
        why = self._no_layer(bn) or self._no_conv(conv)
        if why is not None:
            return why
        if self.layer(bn).act is None:
            return f"the activation inside {bn.target} has no kernel"
        return None if len(conv.users) == 1 else f"the output of {conv.target} has other uses"

    def _no_layer(self, node: fx.Node) -> str | None:
        own = self.layer(node).differs
        if own is not None:
            return f"{node.target} has {own}"
        plain = len(node.args) == 1 and not node.kwargs
        return None if plain else f"{node.target} is called with more than its input"

    def _no_conv(self, conv: fx.Node) -> str | None:
        why = self._no_layer(conv)
        if why is not None:
            return why
        padding = padding_without_kernel(self.module(conv))
        return None if padding is None else f"{conv.target} has {padding}"

    def _add_to_chain(self, add: fx.Node, by_end: dict[fx.Node, ChainPattern]) -> None:
        operands = _operands(add)
        ends = [by_end[o] for o in operands if o in by_end and self._takes(by_end[o], add)]
        if not ends:
            return
        main = max(ends, key=lambda chain: (len(chain.steps), operands.index(chain.last)))
        other = operands[1 - operands.index(main.last)]
        overwrites = add.target in _IN_PLACE_ADDS and operands[0] is other
        if overwrites and not self._aliasing.dies_at(other, add):
            self.left[add] = f"{add.name} writes into {other.name}, which is used again"
            return
        if other is main.input:
            main.residual = ()
        elif by_end.get(other) in ends and by_end[other].input is main.input:
            main.residual = tuple(by_end.pop(other).steps)
        else:
            main.residual = other
        del by_end[main.last]
        main.residual_dies = self._aliasing.dies_at(other, add)
        behind = self._act_behind(add)
        main.added = (add,) if behind is None else (add, behind[1])
        if behind is not None:
            main.steps[-1] = main.steps[-1]._replace(act=behind[0])
        by_end[main.added[-1]] = main

    def _takes(self, chain: ChainPattern, add: fx.Node) -> bool:
        step = chain.steps[-1]
        plain = step.act == "none" and step.pool is None and chain.residual is None
        return plain and self._then(chain.last) is add

    # The others

    def _single(self) -> Iterator[LayerPattern]:
        for node in self._graph.nodes:
            if node.target in _NORM_FUNCTIONS:
                self.left[node] = "called as a function: norms are fused where they are layers"
            if node in self._used or self._kind(node) not in _SINGLE or not node.args:
                continue
            act = self.layer(node).act
            why = (self._no_conv if self._kind(node) == DEPTHWISE else self._no_layer)(node)
            if why is None and act is None:
                why = f"the activation inside {node.target} has no kernel"
            if why is None and self._kind(node) == DEPTHWISE and self.layer(node).parametrized:
                why = f"{node.target} has a parametrization"  # computed anew at each read
            if why is not None:
                self.left[node] = why
                continue
            pieces = self._pieces(node)
            before: Any = [node.args[0]] if pieces else []
            nodes, residual, last = [*before, node], None, node
            if act != "none":
                yield LayerPattern(node, str(act), nodes, pieces=pieces)
                continue
            then = self._then(node)
            adds = then is not None and then.target in _ADDS and then not in self._used
            if then is not None and adds and self._kind(node) == "batch_norm":
                operands = _operands(then)
                if len(operands) == 2 and (
                    then.target not in _IN_PLACE_ADDS or operands[0] is node
                ):
                    residual = operands[1 - operands.index(node)]
                    nodes.append(then)
                    last = then
            behind = self._act_behind(last)
            if behind is None:
                yield LayerPattern(node, "none", nodes, residual, pieces)
            else:
                yield LayerPattern(node, behind[0], [*nodes, behind[1]], residual, pieces)

    def _pieces(self, bn: fx.Node) -> tuple[fx.Node, ...]:
        """Return what a batch norm's input is concatenated of, if it can be read where it lies.

        A layer's gradients are made of its input: who writes into a piece later writes, where
        there is a concatenation, into what nobody needs any more.
        """
        cat: Any = bn.args[0]
        if self._kind(bn) != "batch_norm" or cat in self._used or len(cat.users) != 1:
            return ()
        pieces = _concatenated(cat)
        end = next(reversed(self._graph.nodes))
        writer = self._aliasing.writer_between(cat, end, pieces, set()) if pieces else None
        return tuple(pieces) if writer is None else ()

    def _resizes(self) -> Iterator[ResizePattern]:
        for node in self._graph.nodes:
            made = None if node in self._used else self._resize(node)
            if made is not None:
                yield made

    def _resize(self, node: fx.Node) -> ResizePattern | None:
        """Return a resizing by a mode that has kernels, with a concatenation behind it."""
        if node.target is F.interpolate:
            mode = dict(zip(INTERPOLATE, node.args, strict=False), **node.kwargs).get(
                "mode", "nearest"
            )
            if not node.args or len(node.args) > len(INTERPOLATE):
                return None
            if node.kwargs.get("antialias"):
                self.left[node] = "there is no kernel for antialias=True"
                return None
        elif self._kind(node) == "upsample":
            mode, why = self.module(node).mode, self._no_layer(node)
            if why is not None:
                self.left[node] = why
                return None
        else:
            return None
        if mode not in RESIZES:
            self.left[node] = f"there is no kernel for mode={mode!r}"
            return None
        cat = next(iter(node.users)) if len(node.users) == 1 else None
        parts = [] if cat is None or cat in self._used else _two_of(cat)
        if cat is None or not parts:
            return ResizePattern(node, [node])
        at = parts.index(node)
        return ResizePattern(node, [node, cat], parts[1 - at], skip_last=at == 0)

    def _drops(self) -> Iterator[DropPattern]:
        for node in self._graph.nodes:
            if self._kind(node) == "dropout":
                why = self._no_layer(node)
                if why is None:
                    yield DropPattern(node, [node])
                else:
                    self.left[node] = why
            if node.target not in (F.dropout, F.dropout2d) or not node.args:
                continue
            if node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None) != 0:
                yield DropPattern(node, [node])

    def _linears(self) -> Iterator[LinearPattern]:
        by_end: dict[fx.Node, LinearPattern] = {}
        for node in self._graph.nodes:
            if self._kind(node) != "linear" or self._no_layer(node) is not None:
                continue
            act, *more = self._act_behind(node) or ("none",)
            before = by_end.pop(node.args[0], None)
            if before is not None and len(before.nodes[-1].users) > 1:
                by_end[before.nodes[-1]] = before
                before = None
            found = before or LinearPattern([], [])
            found.steps.append((node, act))
            found.nodes += [node, *more]
            by_end[found.nodes[-1]] = found
        # Without any, float32 has nothing to gain.
        yield from (p for p in by_end.values() if any(act != "none" for _, act in p.steps))


def _operands(add: fx.Node) -> list[fx.Node]:
    """Return the two different nodes that an addition adds, none for anything else."""
    nodes = [a for a in add.args if isinstance(a, fx.Node)]
    plain = len(add.args) == 2 and not add.kwargs
    return nodes if plain and len(nodes) == 2 and nodes[0] is not nodes[1] else []


def _concatenated(cat: fx.Node) -> list[fx.Node]:
    """Return the nodes whose channels torch.cat joins, none for anything else."""
    if cat.target not in _CATS or not cat.args or not isinstance(cat.args[0], (list, tuple)):
        return []
    dim = cat.kwargs.get("dim", cat.kwargs.get("axis", cat.args[1] if len(cat.args) > 1 else 0))
    parts = [part for part in cat.args[0] if isinstance(part, fx.Node)]
    return parts if dim in (1, -3) and len(parts) == len(cat.args[0]) else []


def _two_of(cat: fx.Node) -> list[fx.Node]:
    """Return the two different nodes whose channels torch.cat joins, none for anything else."""
    parts = _concatenated(cat)
    return parts if len(parts) == len(set(parts)) == 2 else []

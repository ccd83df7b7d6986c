"""From a traced graph and its patterns to the Python function that runs instead of a forward."""

import itertools
import keyword
import linecache
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast
from unittest.mock import patch

import torch.fx.graph
import torch.nn.functional as F
from torch import fx, nn

from fastcnn.convert.codegen import fit, runtime
from fastcnn.convert.codegen.folded import (
    FoldedChain,
    Kept,
    folded_linears,
    folded_upsampled_chain,
)
from fastcnn.convert.graph.guards import Compared, has_hooks
from fastcnn.convert.graph.layers import Layers
from fastcnn.convert.graph.matcher import Matcher
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
from fastcnn.convert.options import Options

_numbers = itertools.count()


def drop_identities(
    graph: fx.Graph, modules: dict[str, nn.Module], layers: Layers
) -> list[nn.Module]:
    """Remove the calls of identities, which are in nobody's way then; return those modules."""
    dropped = []
    for node in list(graph.nodes):
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is None or layers[module].kind != "identity":
            continue
        plain = layers[module].differs is None and not has_hooks(module)
        if plain and len(node.args) == 1 and not node.kwargs:
            dropped.append(module)
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph.erase_node(node)
    return dropped


def fuse(
    graph: fx.Graph, matcher: Matcher, patterns: Sequence[Pattern], options: Options
) -> list[tuple[fx.Node, list[Pattern]]]:
    """Put each call in the place of its patterns' last node, in the graph itself; return them."""
    emit = _Emitter(graph, matcher, options)
    calls = [(emit.run(run), run) for run in _runs(patterns, matcher, options)]
    for node in list(graph.nodes):
        plain = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if plain and matcher.layer(node).kind == "linear":
            emit.linear(node)
    return calls


def layer_called(node: fx.Node) -> str | None:
    """Return the path of the layer that a node calls, if it does no more."""
    if node.target is runtime.run_linear:
        node = cast(fx.Node, node.args[1])
        return str(node.target)
    return str(node.target) if node.op == "call_module" else None


def _runs(patterns: Sequence[Pattern], matcher: Matcher, options: Options) -> list[list[Pattern]]:
    """Merge residual blocks, from one with a projection to the next, where memory is "low".

    A stage is merged as far as each block's output is seen by the next alone: backward then
    recomputes it from the stage's input.
    """
    runs: list[list[Pattern]] = []
    for pattern in patterns:
        before = runs[-1][-1] if runs else None
        merges = (
            options.memory == "low"
            and isinstance(pattern, ChainPattern)
            and isinstance(before, ChainPattern)
            and pattern.residual == ()
            and isinstance(before.residual, tuple)
            and pattern.input is before.last
            and set(before.last.users) <= set(pattern.nodes)
            and matcher.may_move([*runs[-1], pattern])
        )
        runs[-1].append(pattern) if merges else runs.append([pattern])
    return runs


class _Emitter:
    def __init__(self, graph: fx.Graph, matcher: Matcher, options: Options) -> None:
        self._graph, self._matcher, self._options = graph, matcher, options
        self._calls: dict[fx.Node, fx.Node] = {}  # by the last nodes, which are gone

    def run(self, run: list[Pattern]) -> fx.Node:
        """Replace the nodes of one pattern, or of merged blocks, by one call."""
        last = self._matcher.last_of(run[-1])
        with self._graph.inserting_before(last.next):
            call = self._blocks(run) if len(run) > 1 else self._call(run[0])
        last.replace_all_uses_with(call)
        self._calls[last] = call
        for node in reversed(self._matcher.nodes_of(run)):
            self._graph.erase_node(node)
        return call

    def linear(self, node: fx.Node) -> None:
        """Let a call of a linear layer choose its products, under the same name."""
        with self._graph.inserting_before(node):
            layer = self._module(node)
        node.op, node.target = "call_function", runtime.run_linear
        node.args = (node.args[0], layer, self._options)

    def _call(self, p: Pattern) -> fx.Node:
        call, options = self._graph.call_function, self._options
        if isinstance(p, ChainPattern):
            return self._chain(p)
        x, *more = [self._value(node) for node in p.inputs]
        second = more[0] if more else None
        if isinstance(p, LayerPattern) and p.pieces:
            xs = tuple(self._value(node) for node in p.pieces)
            residual = None if p.residual is None else more[-1]
            layer = (self._module(p.layer), p.act, residual, options)
            return call(runtime.run_concat_norm, (xs, *layer))
        if isinstance(p, LayerPattern):
            kind = self._matcher.layer(p.layer).kind
            arguments = (x, self._module(p.layer), kind, p.act, second, options)
            return call(runtime.run_layer_act, arguments)
        if isinstance(p, SqueezePattern):
            fcs = self._module(p.fc1), None if p.fc2 is None else self._module(p.fc2)
            return call(runtime.run_squeeze_excite, (x, *fcs, p.act, p.gate, p.dims, options))
        if isinstance(p, LinearPattern):
            computed = any(self._matcher.layer(node).parametrized for node, _ in p.steps)
            if options.mode == "infer" and not computed:
                linears = [(self._matcher.module(node), act) for node, act in p.steps]
                return call(Kept(folded_linears(linears, options)), (x,))
            nodes = tuple((self._module(node), act) for node, act in p.steps)
            return call(runtime.run_linears, (x, nodes, options))
        if isinstance(p, DropPattern) and p.drop.op == "call_module":
            return call(runtime.run_dropout_layer, (x, self._module(p.drop), options))
        if isinstance(p, DropPattern):
            plain = p.drop.target is F.dropout
            function = runtime.run_dropout if plain else runtime.run_dropout2d
            return call(function, p.drop.args, {**p.drop.kwargs, "options": options})
        skip = (second, p.skip_last, options)
        if p.resize.op == "call_module":
            return call(runtime.run_upsample, (x, self._module(p.resize), *skip))
        beside = dict(zip(("concat", "concat_last", "options"), skip, strict=True))
        return call(runtime.run_interpolate, (x,), self._resizing(p) | beside)

    def _chain(self, p: ChainPattern) -> fx.Node:
        call, options = self._graph.call_function, self._options
        folds = options.mode == "infer"
        residual = self._value(p.residual) if isinstance(p.residual, fx.Node) else None
        if p.resize is not None:
            x, *more = [self._value(node) for node in p.resize.inputs]
            beside = (more[0] if more else None, p.resize.skip_last)
            module = p.resize.resize.op == "call_module"
            how = self._module(p.resize.resize) if module else self._resizing(p.resize)
            if folds:
                run = folded_upsampled_chain(self._modules(p.steps), beside[1], options)
                return call(Kept(run), (x, beside[0], how, residual))
            arguments = (x, *beside, how, self._steps(p.steps), residual, options)
            return call(runtime.run_upsampled_chain, arguments)
        x = self._value(p.input)
        if folds:
            # What converted code has made itself nobody else has seen.
            dies = p.residual_dies and (residual or x) in self._calls.values()
            shortcut = self._modules(p.residual) if isinstance(p.residual, tuple) else None
            chain = FoldedChain(self._modules(p.steps), shortcut, dies, options)
            return call(Kept(chain), (x, residual))
        added = self._steps(p.residual) if isinstance(p.residual, tuple) else residual
        return call(Kept(runtime.Chain(options)), (x, self._steps(p.steps), added))

    def _value(self, node: fx.Node) -> fx.Node:
        """Return what now gives the value of a node."""
        return self._calls.get(node, node)

    def _resizing(self, p: ResizePattern) -> dict[str, Any]:
        """Return F.interpolate's arguments by name."""
        how = dict(zip(INTERPOLATE[1:], p.resize.args[1:], strict=False)) | p.resize.kwargs
        return {name: value for name, value in how.items() if name != "antialias"}

    def _blocks(self, run: list[Any]) -> fx.Node:
        x = self._value(run[0].input)
        blocks = tuple((self._steps(p.steps), self._steps(p.residual)) for p in run)
        return self._graph.call_function(runtime.run_blocks, (x, blocks, self._options))

    def _steps(self, steps: Sequence[StepNodes]) -> tuple[Any, ...]:
        return tuple(
            (
                self._module(step.conv),
                None if step.bn is None else self._module(step.bn),
                step.act,
                None if step.pool is None else self._module(step.pool),
            )
            for step in steps
        )

    def _modules(self, steps: Sequence[StepNodes]) -> list[fit.StepModules]:
        """Return the steps with the modules themselves."""

        def of(node: fx.Node | None) -> Any:
            return None if node is None else self._matcher.module(node)

        return [(of(step.conv), of(step.bn), step.act, of(step.pool)) for step in steps]

    def _module(self, node: fx.Node) -> fx.Node:
        return self._graph.create_node("get_attr", str(node.target))


def comparison_of(
    compared: Iterable[Compared], paths: dict[nn.Module, str], name: str
) -> Callable[[Any], bool]:
    """Return a function that compares a module's parts with what they are now, in plain Python.

    For torch.compile, which takes what the guard says for a constant: so it compiles anew where one
    of these changes.
    """
    values: dict[str, Any] = {}
    lines = ["def holds(self):"]
    for at, (module, attribute, how, value) in enumerate(compared):
        if module not in paths:
            continue
        values[f"value_{at}"] = value
        base, found = paths[module], _path_of(paths[module], attribute)
        now = {
            # Its own class, which it may get a converted one for.
            "class": f"getattr(type({found}), '_fastcnn_class', type({found}))",
            "equal": found,
            "is None": f"({found} is None)",
            "has": f"hasattr({_path_of(base)}, {''.join(attribute)!r})",
            "children": f"tuple({found}._modules.keys())",
        }[how]
        lines.append(
            f"    if {now} {'is not' if how == 'class' else '!='} value_{at}: return False"
        )
    return _function("holds", "\n".join([*lines, "    return True"]), values, name)


def _path_of(path: str, attribute: Sequence[str] = (), base: str = "self") -> str:
    """Return code that gets a module by its path from a base, or an attribute of it."""
    found = base
    for part in (*filter(None, path.split(".")), *attribute):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        found = f"{found}.{part}" if plain else f"getattr({found}, {part!r})"
    return found


def function_of(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Compile a graph into a function of a module and its forward's arguments.

    The function alone keeps what its calls hold, as folded weights: a graph is made of cycles, and
    would keep them until a collection.
    """
    # torch.fx would write a child called "global" as self.global.
    with patch.object(
        torch.fx.graph, "_format_target", lambda base, path: _path_of(path, (), base)
    ):
        code = graph.python_code("self")
    values = {name: v.given_up() if isinstance(v, Kept) else v for name, v in code.globals.items()}
    return _function("forward", code.src, values, name)


def _function(made: str, source: str, values: dict[str, Any], name: str) -> Callable[..., Any]:
    """Run source that defines one function, and return it."""
    # A file name of its own, whose text tracebacks and torch.compile's logs can show.
    file = f"<fastcnn.convert {name} {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = dict(values)
    exec(compile(source, file, "exec"), namespace)
    function = namespace.pop(made)  # out of its own globals, which would be a cycle
    weakref.finalize(function, linecache.cache.pop, file, None)
    return cast(Callable[..., Any], function)

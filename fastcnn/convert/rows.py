"""What of a model runs fused, and why the rest does not: a row a call, layer or forward."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from fastcnn.common.text_table import WIDTH, columns
from fastcnn.convert.codegen import fit
from fastcnn.convert.converted import Conversion, LayerConversion
from fastcnn.convert.graph.describe import Left
from fastcnn.convert.graph.layers import CONVS
from fastcnn.convert.parts import Part, Parts
from fastcnn.ops.backends import BACKENDS

# By a pattern's first word: the op that runs it.
_OPS = {
    "batch_norm": "batch_norm_act",
    "cat": "batch_norm_act",
    "interpolate": "upsample",
    "upsample": "upsample",
    "dropout": "dropout",
    "depthwise_conv2d": "depthwise_conv2d",
    "squeeze_excite": "squeeze_excite",
    "linear": "linear_act",
}
# Layers that people look for, and why they are never fused.
UNKNOWN = {"layer_norm": "fastcnn has no kernel for a LayerNorm over the last dimension"}
# Ops that convert takes on the CPU alone, and why.
_ON_CPU = {
    "depthwise_conv2d": "without a batch norm it runs fused on the CPU alone",
    "linear_act": "it runs fused on the CPU alone",
}
_NEVER = {*UNKNOWN.values(), *_ON_CPU.values()}


class ConversionRow(NamedTuple):
    """One call, layer or forward; pattern is empty where nothing convertible is known in it."""

    module: str
    pattern: str
    fused: bool
    backend: str
    reason: str


def left(found: Sequence[ConversionRow]) -> list[ConversionRow]:
    """Return the rows of what is convertible and not converted."""
    return [row for row in found if row.pattern and not row.fused and row.reason not in _NEVER]


def table(found: Sequence[ConversionRow]) -> Iterator[str]:
    """Yield rows as lines of WIDTH columns: each reason below its row."""
    if not found:
        return
    cells = [("module", "pattern", "fused", "runs by"), *map(_cells, found)]
    for row, text in zip((None, *found), columns(cells, (34, 26, 5, 29)), strict=True):
        yield from text
        if row is not None and row.reason:
            yield from textwrap.wrap(
                row.reason, WIDTH - 4, initial_indent="    ", subsequent_indent="    "
            )


def _cells(row: ConversionRow) -> tuple[str, ...]:
    return row.module, row.pattern, "yes" if row.fused else "no", row.backend


def rows_of(model: nn.Module, parts: Parts) -> list[ConversionRow]:
    """Return the rows of a model whose modules are, or will be, converted so."""
    return list(_Walk(model, parts).rows(model, ""))


class _Walk:
    """The rows of a model, each module once."""

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self._parts = parts
        self._seen: set[nn.Module] = set()
        first = next((t for ts in (model.parameters(), model.buffers()) for t in ts), None)
        self._device = "cpu" if first is None else first.device.type

    def rows(
        self, module: nn.Module, path: str, alone: str = "not converted"
    ) -> Iterator[ConversionRow]:
        """Yield the rows of a module; alone: why a layer that has a kernel does not run by it."""
        if module in self._seen:
            return
        self._seen.add(module)
        part = self._parts[module]
        if part.layer.leaf:
            yield from self._layer(module, part, path, alone)
            return
        assert not isinstance(part.conversion, LayerConversion)
        current = None if part.conversion is None else part.conversion.current()
        if current is None:
            yield from self._as_written(module, part, path)
            return
        for call in current.patterns:
            note = None if call.ends_in is None else fit.notes.get(call.ends_in)
            yield self._fused(place(path, call.where), call.words, note)
        yield from self._left(module, path, current.left)
        for called in dict.fromkeys(current.children()):
            yield from self.rows(module.get_submodule(called), child_path(path, called))

    def _left(self, module: nn.Module, path: str, left: Sequence[Left]) -> Iterator[ConversionRow]:
        """Yield the rows of what a trace leaves alone, which its layers need not say again."""
        modules = dict(module.named_modules())
        for where, words, why in left:
            self._seen.update(filter(None, [modules.get(where)]))
            yield ConversionRow(place(path, where), words, False, "PyTorch", why)

    def _as_written(self, module: nn.Module, part: Part, path: str) -> Iterator[ConversionRow]:
        why = None if part.why is None else f"its forward does not trace: {part.why}"
        if isinstance(part.conversion, Conversion):
            why = part.conversion.why_not()
        if why is not None:
            inside = ", ".join(dict.fromkeys(self._own_layers(module)))
            yield ConversionRow(path or type(module).__name__, inside, False, "PyTorch", why)
        yield from self._left(module, path, part.left)
        alone = "not converted" if part.conversion is None else "its forward runs as written"
        alone = "its forward does not call it" if part.left else alone
        for name, child in module.named_children():
            yield from self.rows(child, child_path(path, name), alone)

    def _layer(
        self, module: nn.Module, part: Part, path: str, alone: str
    ) -> Iterator[ConversionRow]:
        words = str(part.layer.kind)
        if part.conversion is not None:
            yield self._fused(path, words, fit.notes.get(module))
        elif part.layer.stands_alone or words in UNKNOWN:
            why = UNKNOWN.get(words) or part.why or alone
            yield ConversionRow(path, words, False, "PyTorch", why)

    def _fused(self, where: str, words: str, note: str | None) -> ConversionRow:
        op = _op(words)
        on_cpu, on_cuda = BACKENDS[op]
        backend = {"cpu": on_cpu, "cuda": on_cuda}.get(self._device, "PyTorch")
        if backend == "PyTorch" or (self._device == "cuda" and not fit.HAS_CUDA):
            why = f"this build has no kernels for {self._device}"
            return ConversionRow(where, words, False, "PyTorch", why)
        if self._device == "cuda" and op in _ON_CPU:
            return ConversionRow(where, words, False, "PyTorch", _ON_CPU[op])
        reason = "" if note is None else f"its last call that was not fused: {note}"
        return ConversionRow(where, words, True, backend, reason)

    def _own_layers(self, module: nn.Module) -> Iterator[str]:
        """Yield the kinds of layers that a forward itself calls, as far as its children tell."""
        for child in module.children():
            layer = self._parts[child].layer
            if layer.kind in CONVS or layer.stands_alone:
                yield str(layer.kind)
            elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                yield from self._own_layers(child)


def _op(words: str) -> str:
    kinds = re.split(r"[- ]+", words)
    if "conv" in kinds:
        return "conv_bn_act"
    return _OPS.get(kinds[0], "group_norm_act")


def child_path(path: str, name: str) -> str:
    """Return the path of a child in a model."""
    return f"{path}.{name}" if path else name


def place(path: str, where: str) -> str:
    """Return "layer1.0: conv1 .. relu" of "layer1.0.conv1 .. layer1.0.relu"."""
    ends = [child_path(path, end) for end in where.split(" .. ")]
    if len(ends) == 1:
        return ends[0]
    parts = [end.split(".") for end in (ends[0], ends[-1])]
    common = 0
    while common < min(map(len, parts)) - 1 and parts[0][common] == parts[1][common]:
        common += 1
    first, last = (".".join(part[common:]) for part in parts)
    inside = f"{first} .. {last}"
    return f"{'.'.join(parts[0][:common])}: {inside}" if common else inside

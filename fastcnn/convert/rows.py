"""What of a model runs fused, and why the rest does not: a row a call, layer or forward."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastcnn.common.text_table import WIDTH, columns
from fastcnn.convert.codegen import runtime
from fastcnn.convert.converted import Conversion, Converted, untraceable
from fastcnn.convert.graph.layers import NORMS, changes, kind_of, own_act
from fastcnn.convert.graph.trace import Untraceable, is_leaf
from fastcnn.convert.unit import unit
from fastcnn.ops.backends import BACKENDS

# By a pattern's first word: the op that runs it.
_OPS = {
    "batch_norm": "batch_norm_act", "interpolate": "upsample",
    "upsample": "upsample", "dropout": "dropout",
}  # fmt: skip


class Row(NamedTuple):
    """One call, layer or forward; pattern is empty where nothing convertible is known in it."""

    module: str
    pattern: str
    fused: bool
    backend: str
    reason: str


def left(found: Sequence[Row]) -> list[Row]:
    """Return the rows of what is convertible and not converted."""
    return [row for row in found if row.pattern and not row.fused]


def table(found: Sequence[Row]) -> str:
    """Return rows as text in WIDTH columns: each reason below its row."""
    if not found:
        return "nothing in this model is convertible"
    cells = [("module", "pattern", "fused", "runs by"), *map(_cells, found)]
    lines = []
    for row, text in zip((None, *found), columns(cells, (34, 26, 5, 29)), strict=True):
        lines += text
        if row is not None and row.reason:
            lines += textwrap.wrap(
                row.reason, WIDTH - 4, initial_indent="    ", subsequent_indent="    "
            )
    return "\n".join([*lines, f"{sum(row.fused for row in found)} of {len(found)} fused"])


def _cells(row: Row) -> tuple[str, ...]:
    return row.module, row.pattern, "yes" if row.fused else "no", row.backend


def rows_of(model: nn.Module) -> list[Row]:
    """Return the rows of a model as it is: nothing of it is fused that was not converted."""
    return list(_Walk(model).rows(model, ""))


class _Walk:
    """The rows of a model, each module once."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: set[nn.Module] = set()
        first = next((t for ts in (model.parameters(), model.buffers()) for t in ts), None)
        self._device = "cpu" if first is None else first.device.type

    def rows(self, module: nn.Module, path: str) -> Iterator[Row]:
        if module in self._seen:
            return
        self._seen.add(module)
        if is_leaf(module):
            yield from self._layer(module, path)
            return
        conversion = module._fastcnn_conversion if isinstance(module, Converted) else None
        current = self._current(conversion)
        if conversion is None or current is None:
            yield from self._as_written(module, path, conversion)
            return
        notes = self._notes(module, conversion)
        for where, words in current.patterns:
            yield self._fused(place(path, where), words, notes.get(where))
        for what, why in current.left:
            yield Row(place(path, _plain(what)), _convertible(module, what), False, "PyTorch", why)
        for called in dict.fromkeys(current.calls):
            yield from self.rows(module.get_submodule(called), child_path(path, called))

    def _current(self, conversion: Any) -> Any:
        """Return the plan that runs; its warning is left to the next call of the module."""
        if conversion is None:
            return None
        warned = set(conversion._warned)
        conversion._warned |= {
            why for made in conversion.plans if (why := made.guard.changed()) is not None
        }
        try:
            return conversion.current()
        finally:
            conversion._warned = warned

    def _as_written(self, module: nn.Module, path: str, conversion: Any) -> Iterator[Row]:
        why = untraceable.get(module)
        if why is not None:
            why = f"its forward does not trace: {why}"
        if conversion is not None:
            changed = next(filter(None, (made.guard.changed() for made in conversion.plans)), None)
            why = f"changed since it was converted: {changed}"
            if changed is None:
                why = "its forward does not trace with its training flags of now"
        if why is not None:
            inside = ", ".join(dict.fromkeys(_own_layers(module)))
            yield Row(path or type(module).__name__, inside, False, "PyTorch", why)
        for name, child in module.named_children():
            yield from self.rows(child, child_path(path, name))

    def _layer(self, layer: nn.Module, path: str) -> Iterator[Row]:
        kind = kind_of(layer)
        if isinstance(layer, Converted):
            yield self._fused(path, str(kind), runtime.notes.get(layer))
        elif kind in (*NORMS, "dropout", "upsample"):
            yield Row(path, str(kind), False, "PyTorch", _no_kernel(layer, str(kind)))

    def _fused(self, where: str, words: str, note: str | None) -> Row:
        on_cpu, on_cuda = BACKENDS[_op(words)]
        backend = {"cpu": on_cpu, "cuda": on_cuda}.get(self._device, "PyTorch")
        if backend == "PyTorch" or (self._device == "cuda" and not runtime.HAS_CUDA):
            why = f"this build has no kernels for {self._device}"
            return Row(where, words, False, "PyTorch", why)
        reason = "" if note is None else f"its last call that was not fused: {note}"
        return Row(where, words, True, backend, reason)

    def _notes(self, module: nn.Module, conversion: Conversion) -> dict[str, str]:
        """Return why calls were not fused when they ran, by where they are."""
        if not any(m in runtime.notes for m in module.modules()):
            return {}
        try:
            calls = unit(module, conversion).calls.values()
        except Untraceable:
            return {}
        noted = ((call.where, runtime.notes.get(call.ends_in)) for call in calls if call.ends_in)
        return {where: why for where, why in noted if why is not None}


def _op(words: str) -> str:
    kinds = re.split(r"[- ]+", words)
    if "conv" in kinds:
        return "conv_bn_act"
    return _OPS.get(kinds[0], "group_norm_act")


def _no_kernel(layer: Any, kind: str) -> str:
    own = changes(layer)
    if own is not None:
        return f"it has {own}"
    if kind == "upsample":
        return f"there is no kernel for mode={layer.mode!r}"
    if kind in NORMS and own_act(layer) is None:
        return "the activation inside it has no kernel"
    return "not converted"


def _own_layers(module: nn.Module) -> Iterator[str]:
    """Yield the kinds of layers that a forward itself calls, as far as its children tell."""
    for child in module.children():
        kind = kind_of(child)
        if kind in ("conv", "dropout", "upsample", *NORMS):
            yield kind
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own_layers(child)


def _convertible(module: nn.Module, what: str) -> str:
    try:
        return kind_of(module.get_submodule(what)) or "call"
    except AttributeError:
        return _plain(what)


def _plain(what: str) -> str:
    """Return a function's name of what str() says of it."""
    return what.removeprefix("<").split(" at ")[0].split()[-1].removesuffix(">")


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

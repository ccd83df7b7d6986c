"""Patterns in words, for report()."""

from torch import fx, nn

from fastcnn.convert.graph.layers import kind_of
from fastcnn.convert.graph.patterns import Chain, Drop, Norm, Pattern, Resize, Step


def describe(pattern: Pattern, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Return where a pattern is, by its first module and the last's, and what it is made of."""
    layers = [str(n.target) for n in pattern.nodes if n.op == "call_module"]
    where = " .. ".join(dict.fromkeys((layers[0], layers[-1]))) if layers else _owned(pattern)
    return where, _words(pattern, modules)


def _owned(pattern: Pattern) -> str:
    """Return the name of a pattern without layers, within the module whose forward it is in."""
    node = pattern.nodes[0]
    owner = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
    return f"{owner}.{node.name}" if owner else node.name


def _words(p: Pattern, modules: dict[str, nn.Module]) -> str:
    if isinstance(p, Chain):
        *before, last = [_step(step) for step in p.steps]
        if p.resize is not None:
            before.insert(0, _words(p.resize, modules))
        if p.residual is None:
            return " > ".join([*before, last])
        beside = {fx.Node: "residual", tuple: "projection"}.get(type(p.residual), "residual")
        beside = "identity" if p.residual == () else beside
        act = p.steps[-1].act
        conv = "conv" if p.steps[-1].bn is None else "conv-bn"
        return " > ".join([*before, f"{conv} + {beside}" + (f" - {act}" if act != "none" else "")])
    if isinstance(p, Norm):
        kind = kind_of(modules[str(p.norm.target)])
        added = " + residual" if p.residual is not None else ""
        return f"{kind}{added}" + (f"-{p.act}" if p.act != "none" else "")
    if isinstance(p, Resize):
        return "interpolate" if p.skip is None else "interpolate-cat"
    assert isinstance(p, Drop)
    return "dropout"


def _step(step: Step) -> str:
    act = f"-{step.act}" if step.act != "none" else ""
    conv = "conv" if step.bn is None else "conv-bn"
    return conv + act + ("-pool" if step.pool is not None else "")

"""The patterns: nodes of a traced forward that become one call.

    ChainPattern     (conv, batch norm, activation, max pool) steps, with what is added before the
                     last activation: a tensor, the chain's own input, or steps on that input. Where
                     they are folded, for inference, convolutions without a batch norm are steps too
    LayerPattern     a norm, or a depthwise convolution in no chain, with an activation behind it; a
                     batch norm also with an addition, and with a concatenation before it
    ResizePattern    a resizing, also one whose output is concatenated with one tensor
    DropPattern      a dropout
    SqueezePattern   squeeze-and-excitation: an image times gates made of its channels' means
    LinearPattern    linear layers one behind the other, of which some have an activation

Each stands for layers, which then keep their own class, or for functions. Nodes of one pattern are
consumed by nobody outside it but the last.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import fx


class StepNodes(NamedTuple):
    """One step of a chain, by its nodes; bn, which folded chains may lack, and pool."""

    conv: fx.Node
    bn: fx.Node | None
    act: str
    nodes: tuple[fx.Node, ...]
    pool: fx.Node | None = None


@dataclass
class ResizePattern:
    """interpolate(x), cat([skip, interpolate(x)], 1), or cat([interpolate(x), skip], 1)."""

    resize: fx.Node
    nodes: list[fx.Node]
    skip: fx.Node | None = None
    skip_last: bool = False

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads: its input, then what is added or concatenated."""
        x: Any = self.resize.args[0]
        return [x, *([self.skip] if self.skip is not None else [])]


@dataclass
class ChainPattern:
    """Steps; residual: None, a node, or the steps of a projection, () for the input itself.

    resize: what makes the first convolution's input, where that is a 3x3 one and reads it alone.
    """

    steps: list[StepNodes]
    resize: ResizePattern | None = None
    residual: fx.Node | tuple[StepNodes, ...] | None = None
    added: tuple[fx.Node, ...] = ()  # the addition and the activation behind it
    residual_dies: bool = False  # nobody reads the residual afterwards

    @property
    def input(self) -> fx.Node:
        """What it reads first."""
        x: Any = self.steps[0].conv.args[0]
        return cast(fx.Node, x)

    @property
    def last(self) -> fx.Node:
        """What it gives."""
        return self.added[-1] if self.added else self.steps[-1].nodes[-1]

    @property
    def nodes(self) -> list[fx.Node]:
        """What becomes one call."""
        shortcut = self.residual if isinstance(self.residual, tuple) else ()
        inside = [n for step in (*shortcut, *self.steps) for n in step.nodes]
        before = [] if self.resize is None else self.resize.nodes
        return [*before, *inside, *self.added]

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads: its input, then what is added or concatenated."""
        read = [self.input] if self.resize is None else self.resize.inputs
        return [*read, *([self.residual] if isinstance(self.residual, fx.Node) else [])]


@dataclass
class LayerPattern:
    """act(layer(x) + residual); pieces: what x is the concatenation of, if nobody else reads it."""

    layer: fx.Node
    act: str
    nodes: list[fx.Node]
    residual: fx.Node | None = None
    pieces: tuple[fx.Node, ...] = ()

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads: its input, then what is added or concatenated."""
        x: Any = self.layer.args[0]
        read = self.pieces or [x]
        return [*read, *([self.residual] if self.residual is not None else [])]


@dataclass
class DropPattern:
    """dropout(x)."""

    drop: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads: its input, then what is added or concatenated."""
        x: Any = self.drop.args[0]
        return [x]


@dataclass
class SqueezePattern:
    """x * gate(fc2(act(fc1(mean of x)))), or x * gate(fc1(mean of x)).

    dims: of the mean as written, () where it is adaptive_avg_pool2d's.
    """

    x: fx.Node
    dims: tuple[int, ...]
    fc1: fx.Node
    fc2: fx.Node | None
    act: str
    gate: str
    nodes: list[fx.Node]

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads."""
        return [self.x]


@dataclass
class LinearPattern:
    """act(linear(x)), and others on what that gives."""

    steps: list[tuple[fx.Node, Any]]  # with the activation's name
    nodes: list[fx.Node]

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads."""
        x: Any = self.steps[0][0].args[0]
        return [x]


Pattern = ChainPattern | LayerPattern | ResizePattern | DropPattern | SqueezePattern | LinearPattern

# F.interpolate's arguments, in their order.
INTERPOLATE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")

"""The activations by name, and the number that the operator schemas carry for each."""

from typing import Literal, get_args

Activation = Literal["none", "relu", "relu6", "leaky_relu", "silu", "gelu", "sigmoid", "hardswish"]

# csrc/common/activation.h holds the same table.
ACT_NUMBER: dict[str, int] = {name: number for number, name in enumerate(get_args(Activation))}

# Those whose derivative can be read off y = act(z); the others need z.
_SLOPE_IS_IN_Y = {ACT_NUMBER[name] for name in ("none", "relu", "relu6")}


def slope_is_in_y(act: int) -> bool:
    """Whether d act / dz can be read off y = act(z), by the schema's number."""
    return act in _SLOPE_IS_IN_Y


def act_number(op: str, act: str) -> int:
    """Return the schema's number of an activation, or raise ValueError naming those there are."""
    number = ACT_NUMBER.get(act) if isinstance(act, str) else None
    if number is None:
        raise ValueError(f"{op}: act: expected one of {', '.join(ACT_NUMBER)}, got {act!r}")
    return number

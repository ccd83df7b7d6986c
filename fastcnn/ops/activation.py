"""The activations by name, and the number that the operator schemas carry for each."""

from typing import Literal, get_args

Activation = Literal["none", "relu", "relu6"]

# csrc/common/activation.h holds the same table.
ACT_NUMBER: dict[str, int] = {name: number for number, name in enumerate(get_args(Activation))}


def act_number(op: str, act: str) -> int:
    """Return the schema's number of an activation, or raise ValueError naming those there are."""
    number = ACT_NUMBER.get(act)
    if number is None:
        raise ValueError(f"{op}: act: expected one of {', '.join(ACT_NUMBER)}, got {act!r}")
    return number

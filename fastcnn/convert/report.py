"""report(): what of a model runs fused, and why the rest does not."""

from typing import Any

from torch import nn

from fastcnn import plan
from fastcnn.convert.converted import Converted
from fastcnn.convert.options import Options, check_module
from fastcnn.convert.parts import decide, parts_of
from fastcnn.convert.rows import ConversionRow, rows_of, table


def report(model: nn.Module | None = None) -> list[Any]:
    """Print what of a model runs fused, and why the rest does not; return the table's rows.

    Of an unconverted model it shows what would be fused. Without a model: which kernels were chosen
    in this process where there are several, and why.

    Raises:
        TypeError: a model that is no Module.
    """
    if model is None:
        return list(plan.report())
    check_module("report", model)
    found = rows(model)
    print(table(found))
    return found


def rows(model: nn.Module) -> list[ConversionRow]:
    """Return a row for all that a model runs fused, and all that could be and is not."""
    if any(isinstance(module, Converted) for module in model.modules()):
        return rows_of(model, parts_of(model))
    return [
        row._replace(fused=False, backend="PyTorch", reason=row.reason or "not converted")
        for row in rows_of(model, decide(model, Options()))
    ]

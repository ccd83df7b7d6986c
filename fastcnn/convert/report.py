"""report(): what of a model runs fused, why the rest does not, and what would be faster."""

import html
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastcnn import plan
from fastcnn.common.checks import check_flag
from fastcnn.common.text_table import WIDTH, columns
from fastcnn.convert.converted import Converted
from fastcnn.convert.options import Options, check_module
from fastcnn.convert.parts import decide, parts_of
from fastcnn.convert.rows import ConversionRow, rows_of, table
from fastcnn.convert.summary import Summary, summary_of


class Report(list[ConversionRow]):
    """A row for all of a model that runs fused or could, and what they come to.

    It is the list of the rows. str() is what report() prints, `details()` all that is known, and a
    notebook shows it as a table.
    """

    def __init__(self, found: list[ConversionRow], summary: Summary) -> None:
        super().__init__(found)
        self.summary = summary
        self._shown: Any = None  # the notebook's cell that has shown it already

    def __str__(self) -> str:
        return "\n".join([*self.summary.lines(), *self._blocks()])

    def __repr__(self) -> str:
        return f"<Report: {self.summary.verdict}>"

    def details(self) -> str:
        """Return it with what runs each row, and each reason in full."""
        return "\n".join([*self.summary.lines(), *([""] if self else []), *table(self)])

    def _blocks(self) -> Iterator[str]:
        """Yield a line for each fused row, and one for all others of one pattern and reason."""
        fused = [(row.module, row.pattern) for row in self if row.fused]
        if fused:
            yield ""
            for lines in columns([("fused", "as one call"), *fused], (36, WIDTH)):
                line = " ".join([lines[0], *map(str.strip, lines[1:])])
                yield line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
        others = Counter((row.pattern, row.reason) for row in self if not row.fused)
        if others:
            yield ""
            yield "not fused"
        for (pattern, reason), count in others.items():
            first = next(
                r for r in self if (r.pattern, r.reason, r.fused) == (pattern, reason, False)
            )
            where = first.module if count == 1 else f"{count} places, the first {first.module}"
            yield f"{pattern or 'calls'} ({where})" + (f": {reason}" if reason else "")

    def _repr_html_(self) -> str:
        head = "<br>".join(html.escape(line) for line in self.summary.lines())
        names = "".join(f"<th>{name}</th>" for name in ConversionRow._fields)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>"
            for row in self
        )
        return f"<p>{head}</p><table><tr>{names}</tr>{rows}</table>"

    def show(self, verbose: bool) -> None:
        """Print it; in a notebook display the table."""
        notebook = _notebook()
        if notebook is None or verbose:
            print(self.details() if verbose else self)
        else:
            _display(self._repr_html_())
        if notebook is not None:
            self._shown = notebook.execution_count

    def _ipython_display_(self) -> None:
        """Show it as the value of a cell, if that is not the one that has made it."""
        notebook = _notebook()
        if notebook is None:
            print(repr(self))
        elif notebook.execution_count != self._shown:
            _display(self._repr_html_())


def _cell(value: str | bool) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _notebook() -> Any:
    """Return IPython's shell where its output is a notebook's, None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell if type(shell).__name__ == "ZMQInteractiveShell" else None


def _display(text: str) -> None:
    from IPython.display import HTML, display

    display(HTML(text))


def report(model: nn.Module | None = None, verbose: bool = False) -> list[Any]:
    """Print what of a model runs fused, why the rest does not, and what would be faster.

    First a summary: how many places of those that fastcnn knows run fused, the conversion's mode
    and memory, the weights' type and layout, and what else gains speed. Then a line for each place.
    Of an unconverted model it says what would be fused.

    Args:
        model: any; None: which kernels were chosen in this process where there are several, and
            why.
        verbose: also what runs each place, and each reason in full.

    Returns:
        The rows, a list that shows itself as a table in a notebook.

    Raises:
        TypeError: a model that is no Module, a verbose that is no bool.

    Example:
        >>> layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> model = fastcnn.convert(torch.nn.Sequential(*layers))
        >>> rows = fastcnn.report(model)
        Sequential: 1 of 1 place runs fused, by oneDNN through PyTorch + C++
        ...
        0 .. 2  conv-bn-relu
        >>> rows[0].fused
        True
    """
    check_flag("report", "verbose", verbose)
    if model is None:
        return list(plan.report())
    check_module("report", model)
    found = _reported(model)
    found.show(verbose)
    return found


def rows(model: nn.Module) -> list[ConversionRow]:
    """Return a row for all that a model runs fused, and all that could be and is not."""
    return list(_reported(model))


def _reported(model: nn.Module) -> Report:
    if any(isinstance(module, Converted) for module in model.modules()):
        parts = parts_of(model)
        found = rows_of(model, parts)
    else:
        parts = decide(model, Options())
        found = [
            row._replace(fused=False, backend="PyTorch", reason=row.reason or "not converted")
            for row in rows_of(model, parts)
        ]
    return Report(found, summary_of(model, parts, found))

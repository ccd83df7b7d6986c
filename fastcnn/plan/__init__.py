"""Planning: of several ways to do the same, the fastest correct one runs.

An op registers candidates (registry.py). Each of its calls makes a `Problem` (problem.py) and asks
which candidate to take; the planner (planner.py) looks it up, or tunes it (tune.py) and writes the
plan file (plan_file.py), or takes PyTorch's own way.

    name = choose(problem)       a dict's lookup
    y = run(problem, x, weight)  the same, and calls the candidate
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.constant_result import constant_result
from fastcnn.plan.planner import Planner, measured, mode_of_environment, open_file
from fastcnn.plan.problem import Problem, describe
from fastcnn.plan.registry import OPS, Candidate, Op, register
from fastcnn.plan.roofline import Kernel
from fastcnn.plan.table import Row, table

__all__ = [
    "Candidate",
    "Kernel",
    "Op",
    "Problem",
    "Row",
    "choose",
    "register",
    "report",
    "rows",
    "run",
    "summary",
]


def __dir__() -> list[str]:
    return __all__


@functools.cache
def _planner() -> Planner:
    return Planner(mode_of_environment(), OPS, measured())


def choose(problem: Problem) -> str:
    """Return the name of the candidate that runs for a problem.

    torch.compile keeps the name as a constant of its graph, chosen while it traces; where it keeps
    sizes symbolic, the plan is the one for the sizes that it saw first (a torch that cannot tell
    them, as 2.11, compiles anew for each size).

    Args:
        problem: one of a registered op; see register for an example.

    Raises:
        ValueError: an unknown op, a problem that no candidate supports, or a wrong FASTCNN_PLAN.
        RuntimeError: tuning found every candidate wrong.
    """
    if torch.compiler.is_compiling():
        # Field by field: a tuple with a class of its own arrives empty (torch 2.13).
        op, x, weight, *others = problem
        sizes = [tuple(_concrete(size) for size in shape) for shape in (x, weight)]
        return _choose_traced(op, *sizes, *others)
    return _planner().choose(problem).name


def run(problem: Problem, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Run the chosen candidate and return what it gives.

    Args:
        problem: as choose's; see register for an example.
        *tensors: as the op's candidates take them.

    Raises:
        ValueError, RuntimeError: as choose, and what the candidate raises.
    """
    name = choose(problem)  # says what is wrong with a problem
    return OPS[problem.op].candidates[name].run(problem, *tensors)


def rows() -> list[Row]:
    """Return what was chosen in this process, sorted by problem.

    Example:
        >>> [row.plan for row in fastcnn.plan.rows()]
        [...]
    """
    chosen = _planner().plans().items()
    return sorted(Row(problem.key(describe(problem.device)), *plan) for problem, plan in chosen)


def report() -> list[Row]:
    """Print what was chosen in this process, and why, as a table; return its rows.

    Example:
        >>> fastcnn.plan.report()
        nothing was planned: no op with several candidates has run
        []
    """
    chosen = rows()
    print(table(chosen))
    return chosen


def summary() -> str:
    """Return mode, plan file of the current device and number of its plans, in a line.

    Example:
        >>> fastcnn.plan.summary()
        '...'
    """
    try:
        mode = mode_of_environment()
    except ValueError as error:
        return str(error)
    if mode == "off":
        return "off"
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    file = open_file(describe(device))
    return f"{mode}; {len(file.entries)} in {file.path or 'no folder: set FASTCNN_CACHE'}"


@constant_result
def _choose_traced(*fields: object) -> str:
    """Choose while torch.compile traces; it calls this instead of looking inside."""
    problem = Problem(*fields)  # type: ignore[arg-type]
    return _planner().choose(problem, busy="under torch.compile").name


def _concrete(size: Any) -> int:
    """Return the size that a symbolic one stands for, as torch.compile saw it."""
    # Here: it imports sympy, and torch.compile has.
    from torch.fx.experimental import symbolic_shapes

    # guard_scalar makes it constant, for a torch that does not tell, as 2.11.
    hint = getattr(symbolic_shapes, "optimization_hint", symbolic_shapes.guard_scalar)
    return int(hint(size))

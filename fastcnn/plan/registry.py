"""Who can do an op: its candidates, and how one is verified."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcnn.plan.problem import Problem
from fastcnn.plan.roofline import Kernel

__all__ = ["OPS", "Candidate", "Op", "register"]


@dataclass(frozen=True)
class Candidate:
    """One way to do an op."""

    name: str
    # run(problem, *tensors) -> the outputs, a Tensor or a tuple of them
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    # Why it cannot do a problem, else None. Not by n, h and w alone: under torch.compile with
    # symbolic sizes the candidate meets others than those that it was asked about.
    supports: Callable[[Problem], str | None]
    # The kernels that it runs one after another, for the model of roofline.py.
    kernels: Callable[[Problem], Sequence[Kernel]]


@dataclass(frozen=True)
class Op:
    """What the candidates of an op have in common."""

    name: str
    # Synthetic inputs on the problem's device, drawn from the generator alone.
    tensors: Callable[[Problem, torch.Generator], tuple[Tensor, ...]]
    # reference(problem, *tensors) -> the outputs, more exact than any candidate's
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    # The candidate that is PyTorch's own way: what runs where nothing was measured. The others may
    # err a few times as much (accuracy.py).
    baseline: str
    # By output, of which output's values it is a sum that may cancel: that one's largest value says
    # what is right for it. None: each is its own.
    scale_of: tuple[int, ...] | None = None
    candidates: dict[str, Candidate] = field(default_factory=dict)

    def supporting(self, problem: Problem) -> tuple[dict[str, Candidate], dict[str, str]]:
        """Return who can do a problem, in the order of registration, and why the others cannot.

        Raises:
            ValueError: nobody can; it says why not, by candidate.
        """
        reasons = {name: one.supports(problem) for name, one in self.candidates.items()}
        able = {name: one for name, one in self.candidates.items() if reasons[name] is None}
        unable = {name: reason for name, reason in reasons.items() if reason is not None}
        if not able:
            why = "; ".join(f"{name}: {reason}" for name, reason in unable.items())
            raise ValueError(f"{self.name}: no candidate for {problem}: {why or 'none registered'}")
        return able, unable


OPS: dict[str, Op] = {}


def register(op: Op, *candidates: Candidate) -> None:
    """Add an op, or candidates to one; among equally fast ones the first registered is taken.

    Args:
        op: the op, the same object each time.
        *candidates: ways to do it.

    Raises:
        ValueError: the name belongs to another one already.

    Example:
        >>> way = fastcnn.plan.Candidate("way", lambda p, x: 2 * x, lambda p: None, lambda p: [])
        >>> inputs = lambda p, generator: (torch.ones(p.x),)
        >>> fastcnn.plan.register(fastcnn.plan.Op("twice", inputs, lambda p, x: 2 * x, "way"), way)
        >>> sizes = (1, 2, 4, 4), (2, 2, 1, 1)
        >>> problem = fastcnn.plan.Problem("twice", *sizes, torch.float32, torch.device("cpu"))
        >>> fastcnn.plan.choose(problem), fastcnn.plan.run(problem, torch.ones(3))
        ('way', tensor([2., 2., 2.]))
    """
    if OPS.setdefault(op.name, op) is not op:
        raise ValueError(f"op: expected a new name, got {op.name}, which is registered")
    for candidate in candidates:
        if op.candidates.setdefault(candidate.name, candidate) is not candidate:
            raise ValueError(
                f"candidate: expected a new name for {op.name}, got {candidate.name}, "
                "which is registered"
            )

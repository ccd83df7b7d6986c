"""PyTorch at its best, and what else may be put beside an op."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from where import HAS_GPU, ON_GPU, TINY

__all__ = ["Graph", "beside", "compiled", "peak_bytes"]

Run = TypeVar("Run", bound=Callable[..., Any])


def compiled(run: Run, **options: Any) -> Run:
    """Return torch.compile's, for each size anew; tiny cases spare its code generator."""
    if TINY:
        return torch.compile(run, dynamic=False, backend="aot_eager")
    return torch.compile(run, dynamic=False, **options)


def beside(eager: Run) -> dict[str, Run]:
    """Return PyTorch's ways by name; on the CPU torch.compile gains nothing over eager."""
    return {"eager": eager, **({"compiled": compiled(eager)} if ON_GPU else {})}


class Graph:
    """A call of no arguments as one CUDA graph, captured when it is first made.

    What it reads and writes stays where it was. Without a GPU it is the call.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._graph: Any = None

    def __call__(self, _: Any = None) -> None:
        """Replay."""
        if not HAS_GPU:
            self._run()
            return
        if self._graph is None:
            self._capture()
        self._graph.replay()

    def _capture(self) -> None:
        # Warmed up on another stream, as CUDA graphs ask for: what is set up once stays outside.
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Return the most memory that a call takes on the GPU, beside what was taken before."""
    if not HAS_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

"""CUDA graphs for tests: captured on a GPU, recomputed where there is none."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.device import HAS_GPU
from torch import Tensor
from torch.utils import _pytree as pytree

from fastcnn.graphs import GraphedFunction, graphed

Replay = Callable[[], None]
WARM_UPS = 2


def captured(run: Callable[[], Sequence[Tensor]]) -> tuple[list[Tensor], Replay]:
    """Return run's results and what fills them anew: a graph's replay.

    It has run WARM_UPS times by then, on the stream that is captured. Without a GPU `run` is
    called again and its results are copied: all but the capture is then as on one.
    """
    if not HAS_GPU:
        for _ in range(WARM_UPS):
            found = list(run())

        def again() -> None:
            for old, new in zip(found, run(), strict=True):
                old.copy_(new)

        return found, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = list(run())
    return found, graph.replay


class RepeatedGraph:
    """What graphed() needs of a graph, without a GPU: a replay runs the captured function again.

    Its results stay where they were at the capture, as those of a CUDA graph do, and so do the
    gradients of parameters that had none before. A capture changes nothing: the tensors of state,
    and PyTorch's generator, are put back.
    """

    def __init__(self, state: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self._state, self._parameters = state, parameters
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._function: Callable[[], Any] = lambda: None
        self._results: list[Tensor] = []

    def run(self, function: Callable[[], Any]) -> Any:
        """Return function()."""
        return function()

    def capture(self, function: Callable[[], Any]) -> Any:
        """Return the results that each replay fills anew."""
        before, random = [t.detach().clone() for t in self._state], torch.get_rng_state()
        had = [p.grad for p in self._parameters]
        result = function()
        self._gradients = [
            (p, p.grad)
            for p, grad in zip(self._parameters, had, strict=True)
            if p.grad is not None and p.grad is not grad
        ]
        with torch.no_grad():
            for t, value in zip(self._state, before, strict=True):
                t.copy_(value)
        torch.set_rng_state(random)
        self._function, self._results = function, tensors_of(result)
        for t in self._results:
            t.detach().zero_()
        return result

    def replay(self, fill: Callable[[], None], read: Callable[[], Any]) -> Any:
        """Run the function with other inputs, and return what is read of its results."""
        fill()
        for p, _ in self._gradients:
            p.grad = None
        for old, new in zip(self._results, tensors_of(self._function()), strict=True):
            old.detach().copy_(new)
        for p, grad in self._gradients:
            assert p.grad is not None
            grad.copy_(p.grad)
            p.grad = None  # a graph knows no Python: it is for others to put it there
        return read()


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors in a result."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def graphed_here(
    function: Callable[..., Any],
    *example: Any,
    state: Sequence[Tensor] = (),
    parameters: Sequence[Tensor] = (),
    warmup: int = 3,
) -> Callable[..., Any]:
    """Return fastcnn.graphed of a function; without a GPU, of a RepeatedGraph with these tensors.

    parameters: whose gradients outlive the function.
    """
    if HAS_GPU:
        return graphed(function, *example, warmup=warmup)
    return GraphedFunction(function, example, warmup, RepeatedGraph(state, parameters))

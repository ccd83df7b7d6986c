"""CUDA graphs for tests: captured on a GPU, recomputed where there is none."""

from collections.abc import Callable, Sequence

import torch
from support.device import HAS_GPU
from torch import Tensor

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

"""How long a device takes for a call that finds cold caches."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["Timer", "timer_for"]


class Timer(Protocol):
    """A device's clock."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked for; raise what went wrong there."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Call `run` once, and return how long the device took."""


class _CpuTimer:
    def __init__(self) -> None:
        # Above the 32 MiB of cache that 2 cores of an EPYC have for themselves.
        self._flush = torch.empty(64 << 20, dtype=torch.uint8)

    def synchronize(self) -> None:
        pass

    def seconds(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class _CudaTimer:
    """Events around the call; clearing memory keeps the device busy while kernels are queued."""

    def __init__(self, device: torch.device) -> None:
        self._flush: torch.Tensor | None = None  # not for what is only checked
        self._device = device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush is None:  # above the largest L2 so far, 126 MB (B200)
            self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=self._device)
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def timer_for(device: torch.device) -> Timer:
    """Return the clock of a device, which has to be the current one when it is used."""
    return _CudaTimer(device) if device.type == "cuda" else _CpuTimer()

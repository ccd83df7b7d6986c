"""How long a device takes for a call that finds cold caches."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["Timer", "timer_for"]


# Seconds for which the device spins before a call, and how far that may grow. An op of this package
# takes the host 50 to 80 us forward and backward on the smallest tensors, a converted bottleneck
# 450, the same modules one by one 170 (2-core AMD EPYC, CPU tensors: launching CUDA kernels comes
# on top), and clearing 256 MB an H200 about 80: without a spin a short op's time would be the
# host's. The first call of a convolution or a compiled function takes longer than any spin.
SPIN, LONGEST_SPIN = 1e-3, 16e-3
SPIN_CLOCK = 2e9  # torch.cuda._sleep counts cycles: an H200 runs at 1.98 GHz at most


class Timer(Protocol):
    """A device's clock."""

    late: int
    """Calls so far whose time may include waiting for the host."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked for; raise what went wrong there."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Call `run`, and return how long the device took; again if the host was too slow."""


class _CpuTimer:
    def __init__(self) -> None:
        # Above the 32 MiB of cache that 2 cores of an EPYC have for themselves.
        self._flush = torch.empty(64 << 20, dtype=torch.uint8, device="cpu")
        self.late = 0

    def synchronize(self) -> None:
        pass

    def seconds(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class _CudaTimer:
    """Events around the call, on a device that spins until the host has queued the whole call.

    The device spins, clears its L2 and passes the first event. Where it had not passed it when the
    host was done with queueing, the time between the events is the device's alone, and as little as
    in a CUDA graph. Else the spin grows fourfold, for all later calls too, and the call is made
    again. With the longest spin the time is taken as it is, and counted as late: a call that waits
    for the device, or has more kernels than the device's queue holds (about 1000), always is.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush: torch.Tensor | None = None  # not for what is only checked
        self._device = device
        self._spin = SPIN
        self.late = 0

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def seconds(self, run: Callable[[], object]) -> float:
        while True:
            took, in_time = self._once(run)
            if in_time or self._spin >= LONGEST_SPIN:
                self.late += not in_time
                return took
            self._spin *= 4

    def _once(self, run: Callable[[], object]) -> tuple[float, bool]:
        """Return the seconds, and whether all was queued before the device began."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush is None:  # above the largest L2 so far, 126 MB (B200)
            self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=self._device)
        torch.cuda._sleep(int(self._spin * SPIN_CLOCK))
        self._flush.zero_()
        start.record()
        run()
        end.record()
        in_time = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, in_time


def timer_for(device: torch.device) -> Timer:
    """Return the clock of a device, which has to be the current one when it is used."""
    return _CudaTimer(device) if device.type == "cuda" else _CpuTimer()

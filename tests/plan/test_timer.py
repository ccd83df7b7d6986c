"""fastcnn.plan.timer on CUDA, against a device whose time and whose host's time are synthetic."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fastcnn.lab import interleaved
from fastcnn.plan.timer import Timer, timer_for

DEVICE = torch.device("cuda", 1)
CLEARING = 80e-6


class Machine:
    """A host that queues and a device that does it in order: each has a time of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        self.asked: list[str] = []
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue("spin", cycles / 2e9))
        monkeypatch.setattr(torch, "empty", self.memory)

    def queue(self, what: str, seconds: float) -> None:
        """The device begins when it is free, and not before it is asked."""
        self.asked.append(what)
        self.device = max(self.host, self.device) + seconds

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record() -> None:
            self.queue("event", 0.0)
            event.at = self.device

        def synchronize() -> None:
            self.host = max(self.host, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: self.host >= event.at
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def memory(self, size: int, *, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
        assert size * dtype.itemsize > 126e6  # B200's L2
        assert device == DEVICE
        return SimpleNamespace(zero_=lambda: self.queue("clear", CLEARING))

    def launch(self, kernels: int, host: float, device: float) -> Callable[[], None]:
        """A call of some kernels, and what each takes of the host's and of the device's time."""

        def run() -> None:
            for _ in range(kernels):
                self.host += host
                self.queue("kernel", device)

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def timer(machine: Machine) -> Timer:
    return timer_for(DEVICE)


def test_a_cold_call_in_one_piece(machine: Machine, timer: Timer) -> None:
    runs = {"kernel": machine.launch(2, 1e-6, 125e-6)}
    assert interleaved(runs, 2, 0, timer.seconds) == {"kernel": [pytest.approx(250e-6)] * 2}
    # Clearing is outside of what is timed, and nothing else comes between the events.
    assert machine.asked == ["spin", "clear", "event", "kernel", "kernel", "event"] * 2


def test_short_kernels_do_not_wait_for_the_host(machine: Machine, timer: Timer) -> None:
    # Six kernels of 5 us, queued by a slow host in 360 us, far longer than clearing takes. With
    # clearing alone in front of them this would be the host's time.
    assert timer.seconds(machine.launch(6, 60e-6, 5e-6)) == pytest.approx(30e-6)
    assert timer.late == 0


@pytest.mark.parametrize(("host", "spins"), [(1.5e-3, 2), (7e-3, 3)])
def test_a_slower_host_gets_a_longer_spin(
    machine: Machine, timer: Timer, host: float, spins: int
) -> None:
    run = machine.launch(1, host, 5e-6)
    assert timer.seconds(run) == pytest.approx(5e-6)
    assert machine.asked.count("spin") == spins
    assert timer.seconds(run) == pytest.approx(5e-6)  # which stays
    assert machine.asked.count("spin") == spins + 1
    assert timer.late == 0


def test_one_slow_first_call_is_made_again(machine: Machine, timer: Timer) -> None:
    # As one that compiles.
    hosts = iter([60.0, 100e-6, 100e-6])
    assert timer.seconds(lambda: machine.launch(1, next(hosts), 5e-6)()) == pytest.approx(5e-6)
    assert timer.late == 0


def test_a_call_that_waits_for_the_device_is_late(machine: Machine, timer: Timer) -> None:
    def run() -> None:
        machine.launch(1, 10e-6, 5e-6)()
        machine.host = max(machine.host, machine.device)  # reads a result
        machine.launch(1, 10e-6, 5e-6)()

    assert timer.seconds(run) == pytest.approx(20e-6)  # one launch is in the time
    assert timer.late == 1
    assert timer.seconds(run) == pytest.approx(20e-6)
    assert timer.late == 2
    assert machine.asked.count("spin") == 4  # of 1, 4 and 16 ms, and of 16 again

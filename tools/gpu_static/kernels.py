"""What is asked of a CUDA kernel's code, and what it reaches.

H200: 132 SMs that issue 4 instructions a clock, 1.85 GHz where memory bounds, a copy of 4.3 TB/s.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from gpu_static.loops import Trip, hot_trips
from gpu_static.sass import Function

ROOT = Path(__file__).resolve().parents[2]
REGISTER_FILE, THREADS_OF_SM = 65536, 2048
COPY = 4.3e12  # bytes a second
# Instructions that an SM may issue a byte while it copies.
ISSUED_PER_BYTE = 4 * 1.85e9 * 132 / COPY
MOST_ISSUE = 0.7  # of them: what is asked, and what scheduling is taken to reach
LEAST_IN_FLIGHT = 40 << 10  # bytes of an SM

# Kernels of a few microseconds; and those that read some bytes several times, so that a share by
# the bytes they access flatters them. All others walk their tensors once.
SMALL = r".*finalize|batch_norm_(merge|running)|depthwise_conv2d_pack|upsample_tables"
SMALL += r"|squeeze_excite_(rows|columns)"
CACHED = r"upsample_(fwd|bwd)|depthwise_conv2d_(strip|pixel|bwd_weight)|augment"
# Launched with blocks for as many an SM (plan_columns).
PLANNED = (
    r"batch_norm_act|group_norm_act_(stats|apply|reduce|dx)|pixel_norm_act_reduce|squeeze_excite"
)


@dataclass
class Row:
    """A kernel, and what its code reaches."""

    function: Function
    kind: str  # "walks", "cached" or "small"
    trips: list[Trip]  # of its hot loops

    @property
    def name(self) -> str:
        """The kernel's, with the template's arguments."""
        return self.function.name

    @property
    def blocks(self) -> int:
        """Blocks on an SM, by their registers and as the launcher makes them."""
        registers = -(-self.function.registers // 8) * 8 * self.function.threads
        fit = min(REGISTER_FILE // registers, THREADS_OF_SM // self.function.threads)
        if not re.match(PLANNED, self.function.kernel):
            return fit
        small = self.function.kernel == "batch_norm_act_stats_kernel"
        return min(fit, constant("kSmallBlocksPerSm" if small else "kBlocksPerSm"))

    @property
    def in_flight(self) -> int:
        """Bytes that an SM has asked for at once, in the hot loop that asks for least."""
        threads = self.blocks * self.function.threads
        return threads * min(trip.in_flight for trip in self.trips)

    @property
    def issue(self) -> float:
        """The share of its issue slots that an SM needs at the copy's speed, in the worst loop."""
        return max(trip.issued_per_byte for trip in self.trips) / ISSUED_PER_BYTE

    @property
    def narrow(self) -> int:
        """Accesses of less than 16 bytes in the hot loops of a kernel that has vectors."""
        if vector_of(self.function) == 1:
            return 0
        return sum(width < 16 for width in self._widths())

    @property
    def wide(self) -> int:
        """Accesses of 16 bytes in the hot loops."""
        return sum(width == 16 for width in self._widths())

    def _widths(self) -> list[int]:
        accesses = {id(i): i for t in self.trips for i in t.code if i.name in ("LDG", "STG")}
        return [access.width for access in accesses.values()]

    @property
    def share_of_copy(self) -> float:
        """The share of the copy's bandwidth that these numbers let expect, nothing else counted."""
        return min(1.0, self.in_flight / LEAST_IN_FLIGHT, MOST_ISSUE / self.issue)

    def misses(self) -> dict[str, float]:
        """What is asked and not reached, and how far the kernel is."""
        found: dict[str, float] = {}
        if self.function.spilled:
            found["spilled bytes"] = self.function.spilled
        if self.kind == "walks":
            if self.issue > MOST_ISSUE:
                found["issue %"] = round(100 * self.issue)
            if self.in_flight < LEAST_IN_FLIGHT:
                found["bytes missing in flight"] = LEAST_IN_FLIGHT - self.in_flight
        if self.kind != "small" and self.narrow:
            found["narrow accesses"] = self.narrow
        return found


def row_of(function: Function) -> Row:
    """Read a kernel's code."""
    if re.match(SMALL, function.kernel):
        return Row(function, "small", [])
    kind = "cached" if re.match(CACHED, function.kernel) else "walks"
    mark_counted(function)
    # With a residual a batch norm moves a third more, or a half.
    least = 2 / 3 if function.kernel.startswith("batch_norm_act") else 1
    trips = hot_trips(function, inner_trips(function), least)
    if not trips:
        raise ValueError(f"{function.name}: expected a loop or a way that moves a tensor, got none")
    return Row(function, kind, trips)


def mark_counted(function: Function) -> None:
    """Leave out what is no access to a tensor, and what is under a predicate where others are not.

    The latter is a residual's, which may be missing: a share is never better than without one.
    """
    width = vector_of(function) * (4 if function.arguments.startswith("float") else 2)
    named = "," in function.arguments  # else its type says nothing of its tensors
    for name in ("LDG", "STG"):
        accesses = [i for i in function.code if i.name == name]
        of_tensors = [i for i in accesses if i.width == width or not named]
        always = [i for i in of_tensors if not i.conditional]
        counted = always if 2 * len(always) >= len(of_tensors) else of_tensors
        for access in accesses:
            access.counted = any(access is i for i in counted)


def inner_trips(function: Function) -> int:
    """How often a hot loop goes through a loop inside: once for each vector of a group."""
    if function.kernel.startswith("dropout_channels_last"):
        return vector_of(function)
    backward = re.match(r"batch_norm_act_(reduce|dx|one_pass_bwd)", function.kernel)
    return 2 if backward else 4  # kBwdUnroll and kUnroll of the sources


def vector_of(function: Function) -> int:
    """Elements of a kernel's vectors: its second template argument."""
    words = [word.strip() for word in function.arguments.split(",")]
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 1


def constant(name: str) -> int:
    """A constant of the sources, as how many blocks an SM the launchers plan for."""
    text = (ROOT / "csrc" / "cuda" / "columns.cuh").read_text()
    found = re.search(rf"constexpr int {name} = (\d+);", text)
    assert found, f"expected {name} in columns.cuh, got none"
    return int(found[1])

"""Triton's kernels on tensor cores: the clocks that their loops need to issue, and to multiply."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_static.loops import Ways
from gpu_static.sass import ARCH, functions

# Of an SM's tensor cores, a clock.
FLOPS = {"BF16": 4096, "F16": 4096, "TF32": 2048, "S8": 8192, "U8": 8192}
SHAPE = re.compile(r"(?:HGMMA|IGMMA)\.(\d+)x(\d+)x(\d+)\.")


@dataclass
class MatrixRow:
    """A kernel, and one trip of its loop over the products."""

    name: str
    warps: int
    registers: int
    spilled: int
    issued: int  # instructions of a warp
    multiplying: float  # clocks of the tensor cores
    serialised: bool  # ptxas says so: C7515

    @property
    def issuing(self) -> float:
        """Clocks that an SM needs to issue them."""
        return self.issued * self.warps / 4

    @property
    def ratio(self) -> float:
        """Above 1 the tensor cores wait."""
        return self.issuing / self.multiplying

    def misses(self) -> dict[str, float]:
        """What is asked and not reached, and how far the kernel is."""
        found: dict[str, float] = {}
        if self.spilled:
            found["spilled bytes"] = self.spilled
        if self.ratio > 1:
            found["issue over matrix %"] = round(100 * self.ratio)
        if self.serialised:
            found["serialised"] = 1
        return found


def rows() -> list[MatrixRow]:
    """Compile all kernels of convolutions for sm_90, and read their loops."""
    from support.triton_compile import SERIALISED, assembled, cases, compiled

    found = []
    for name, case in cases():
        made = compiled(case, ARCH)
        ptx = made.asm["ptx"]
        if "wgmma" in ptx:
            found.append(_row(name, made, SERIALISED in assembled(ptx, ARCH)))
    return found


def _row(name: str, made: Any, serialised: bool) -> MatrixRow:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "made.cubin"
        cubin.write_bytes(made.asm["cubin"])
        (function,) = functions(cubin)
    warps = made.metadata.num_warps
    ways = Ways(function.code, 1)
    issued, multiplying = max(
        (max(way.issued for way in ways.through(header)), _clocks(ways, body, warps))
        for header, body in ways.loops.items()
        if _clocks(ways, body, warps)
        and not any(other < body and _clocks(ways, other, warps) for other in ways.loops.values())
    )
    return MatrixRow(
        name,
        warps,
        function.registers,
        function.spilled,
        issued,
        multiplying,
        serialised,
    )


def _clocks(ways: Ways, body: set[int], warps: int) -> float:
    """What the products of a loop's trip take; four warps share one."""
    total = 0.0
    for instruction in (i for n in body for i in ways.blocks[n].code):
        if shape := SHAPE.match(instruction.opcode):
            m, n, k = map(int, shape.groups())
            kind = next((t for t in FLOPS if t in instruction.opcode.split(".")), "F16")
            total += 2 * m * n * k / FLOPS[kind] * warps / 4
    return total

"""docs/gpu-static.md, from the rows of all kernels."""

from collections.abc import Sequence

from gpu_static.kernels import LEAST_IN_FLIGHT, MOST_ISSUE, Row
from gpu_static.known import compiler
from gpu_static.matrix import MatrixRow
from gpu_static.networks import CUDNN_MEMORY, PYTORCH, TENSOR_CORES, Step

HEAD = """# What the compiled GPU code says

`make sass` writes this page (`tools/gpu_static/`): nothing here is measured, all of it is read in
machine code for sm_90, by nvcc {nvcc} and Triton {triton}. `tests/kernels/test_gpu_static.py` fails
where a figure that is asked for is missed by more than `tools/gpu_static/known_misses.json` says.

The device is a H200 as `docs/gpu-notes.md` has it: 132 SMs that issue 4 instructions a clock, 1.85
GHz where memory bounds, a copy of 4.3 TB/s.

* **Hot loop**: the loops without another inside that load most of a kernel's tensor, or the whole
  kernel where there is none. A trip is the slowest way through it, so of the slowest activation.
  Loads and stores of tensors count, parameters' do not, nor what only a residual needs. Loops over
  shared memory are not seen: of one-pass kernels the figures are of the loops that load.
* **In flight**: blocks on an SM (by registers, and by how many the launcher makes) x threads x
  bytes that a thread asks for before it needs the first. Asked: {in_flight} KB.
* **Issue**: instructions a byte, as a share of what an SM can issue at the copy's speed. Asked: at
  most {issue} %.
* **Of copy**: the least of 100 %, in flight / {in_flight} KB and {issue} % / issue. A prediction by
  these two alone.
* **Accesses**: 16-byte ones of the hot loops, and narrower ones, which are asked to be none where a
  kernel has vectors.
* Missed figures are bold. Kernels of single elements serve odd sizes and misaligned tensors alone.
"""
CACHED = """Kernels that read some bytes several times, mostly from caches: the issue is by bytes
that they access, so it flatters them, and nothing but spills and narrow accesses is asked.
"""
SMALL = "Kernels of a few microseconds: tables, packed weights, merged partial values.\n"
MATRIX = """Triton's convolutions, a trip of the loop over products: clocks that an SM needs to
issue its instructions, and its tensor cores to multiply. Asked: no more of the first, and that
ptxas serialises nothing (its C7515).
"""
NETWORKS = """A training step in bf16, channels_last, memory="full", from the shares of the copy
above and guesses for the rest: convolutions reach {tensor_cores:.0f} TFLOP/s on tensor cores or
{cudnn:.0%} of the copy, depthwise ones too, PyTorch's other kernels {pytorch:.0%}. Without host,
gaps between kernels and optimizer. Shares are of the slowest activation: with ReLU it is less.
"""
NETWORK_COLUMNS = ("network", "batch", "ms", "images/s", "bound by tensor cores", "ms by operation")
WALKS_COLUMNS = ("kernel", "registers", "spilled", "blocks/SM", "KB in flight", "16-byte")
WALKS_COLUMNS += ("narrower", "instr. a KB", "issue", "of copy")
MATRIX_COLUMNS = ("kernel", "warps", "registers", "spilled", "instr. a warp", "issue clocks")
MATRIX_COLUMNS += ("matrix clocks", "issue / matrix", "serialised")


def text(rows: Sequence[Row], products: Sequence[MatrixRow], networks: Sequence[Step]) -> str:
    """Return the page."""
    head = HEAD.format(**compiler(), in_flight=LEAST_IN_FLIGHT >> 10, issue=round(100 * MOST_ISSUE))
    guesses = NETWORKS.format(tensor_cores=TENSOR_CORES / 1e12, cudnn=CUDNN_MEMORY, pytorch=PYTORCH)
    kinds: dict[str, list[Row]] = {"walks": [], "cached": [], "small": []}
    for row in sorted(rows, key=lambda row: row.name):
        kinds[row.kind].append(row)
    walks, cached = ([_walk_cells(row) for row in kinds[kind]] for kind in ("walks", "cached"))
    small = [
        (f"`{row.name}`", f"{row.function.registers}", _marked(row.function.spilled))
        for row in kinds["small"]
    ]
    return "\n".join(
        (
            head,
            "## Kernels that walk their tensors once\n",
            _table(WALKS_COLUMNS, walks),
            f"## Kernels that read through caches\n\n{CACHED}",
            _table(WALKS_COLUMNS, cached),
            f"## Small kernels\n\n{SMALL}",
            _table(("kernel", "registers", "spilled"), small),
            f"## Kernels on tensor cores\n\n{MATRIX}",
            _table(MATRIX_COLUMNS, [_matrix_cells(row) for row in products]),
            f"## Whole networks\n\n{guesses}",
            _table(NETWORK_COLUMNS, [_network_cells(step) for step in networks]),
        )
    )


def _walk_cells(row: Row) -> tuple[str, ...]:
    missed = row.misses()
    asked = row.kind == "walks" and "one_pass" not in row.name
    return (
        f"`{row.name}`",
        f"{row.function.registers}",
        _marked(row.function.spilled),
        f"{row.blocks}",
        _marked(f"{row.in_flight >> 10}", "bytes missing in flight" in missed),
        f"{row.wide}",
        _marked(row.narrow),
        f"{1024 * max(trip.issued_per_byte for trip in row.trips):.0f}",
        _marked(f"{row.issue:.0%}", "issue %" in missed),
        f"{row.share_of_copy:.0%}" if asked else "",
    )


def _matrix_cells(row: MatrixRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.warps}",
        f"{row.registers}",
        _marked(row.spilled),
        f"{row.issued}",
        f"{row.issuing:.0f}",
        f"{row.multiplying:.0f}",
        _marked(f"{row.ratio:.2f}", row.ratio > 1),
        _marked("yes" if row.serialised else "no", row.serialised),
    )


def _network_cells(step: Step) -> tuple[str, ...]:
    kinds = ", ".join(f"{kind} {1e3 * seconds:.1f}" for kind, seconds in step.by_kind())
    return (
        step.name,
        f"{step.images}",
        f"{1e3 * step.seconds:.1f}",
        f"{step.images / step.seconds:.0f}",
        f"{step.share_of('tensor cores'):.0%}",
        kinds,
    )


def _marked(value: object, missed: bool | None = None) -> str:
    """A cell: bold where it misses, which a number does above 0 unless told otherwise."""
    return f"**{value}**" if (value if missed is None else missed) else f"{value}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

"""Where a kernel misses what is asked, known_misses.json says so, and by how much.

A test compares: what gets worse or is new fails it, and what gets better asks for a shorter list.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import triton

from fastcnn import _C
from gpu_static.kernels import Row
from gpu_static.matrix import MatrixRow

FILE = Path(__file__).with_name("known_misses.json")
Misses = dict[str, dict[str, float]]
NOISE = 3  # in percent of a figure: the same source in another place of its file


def compiler() -> dict[str, str]:
    """What made the code that the list speaks of."""
    return {"nvcc": _C.cuda_version, "triton": triton.__version__}


def found_misses(rows: Sequence[Row | MatrixRow]) -> Misses:
    """What each kernel misses, in the order of their names."""
    named = {row.name: row.misses() for row in rows}
    return {name: misses for name, misses in sorted(named.items()) if misses}


def differences(rows: Sequence[Row | MatrixRow]) -> tuple[list[str], list[str]]:
    """What is worse than the list says, and what is better."""
    known: Misses = json.loads(FILE.read_text())["misses"]
    worse, better = [], []
    for row in rows:
        now, then = row.misses(), known.get(row.name, {})
        for figure in sorted({*now, *then}):
            got, listed = now.get(figure, 0), then.get(figure, 0)
            told = f"{row.name}: {figure}: {got}, listed {listed}"
            if got > listed * (1 + NOISE / 100):
                worse.append(told)
            elif got < listed * (1 - NOISE / 100):
                better.append(told)
    return worse, better

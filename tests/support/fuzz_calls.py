"""Random calls of torch.ops.fastcnn with invalid arguments, in a process that may end by one.

A call is a function of a seed and its number alone: drawn(seed, number) is one that was reported.
Its tensors end where a page without access begins, or begin where one ends: a byte that is read or
written beyond them ends the process.
"""

import math
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.guarded import guarded
from support.invalid_arguments import ANY, CHANNELS, IMAGE, IMAGES, STORAGE, numbers, spoiled
from support.operator_arguments import OPERATORS, PYTORCHS_OWN, good_arguments, variants
from support.paths import TESTS
from support.shapes import LAYOUTS
from torch import Tensor

MEMORY = 256 << 20  # bytes that a call may take beyond what the process has: more is refused
SECONDS = 60  # of the processor, for a call: what fits into MEMORY takes one
SIZES = [-(2**63), -1, 0, 1, 2**20, 2**24, 2**31 - 2, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]
REALS = [-math.inf, -1.0, -1e-5, -0.0, 0.0, 5e-324, 1e30, math.inf, math.nan]
ALL = [*OPERATORS, *PYTORCHS_OWN]


class Call(NamedTuple):
    """An operator's arguments, what was done to them, and whether they must be refused."""

    op: str
    arguments: dict[str, Any]
    words: str
    refused: bool


def drawn(seed: int, number: int) -> Call:
    """Return a call."""
    r = random.Random(f"{seed} {number}")
    torch.default_generator.manual_seed(r.getrandbits(32))
    op, layout = r.choice(ALL), r.choice(list(LAYOUTS))
    dtype = r.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    good = good_arguments(op, dtype, layout, w=2 * r.choice([1, 2, 2, 3, 8, 17]))
    arguments = r.choice(variants(op, good))
    if op.startswith("upsample") and r.random() < 0.05:
        arguments |= _far_resized(r, arguments)
    spoiled, words, lacking, refused = {}, [], [], False
    small = [k for k, t in arguments.items() if not isinstance(t, Tensor) or t.numel() < 2**16]
    for name in r.sample(small, min(len(small), r.choice([0, 1, 1, 2, 3]))):
        kind, spoiled[name] = _spoiled(r, op, name, arguments[name])
        words.append(f"{name}: {kind}")
        lacking += [name] * (kind in STORAGE)
        refused |= kind in STORAGE or _is_no_eps(name, spoiled[name])
    front = r.random() < 0.3
    arguments |= spoiled
    for name, given in arguments.items():
        several = isinstance(given, list)
        for i, t in enumerate(given if several else [given]):
            if isinstance(t, Tensor) and t.is_meta:
                refused = False  # without data nothing is computed
            elif isinstance(t, Tensor) and t.layout is torch.strided and name not in lacking:
                if several:
                    given[i] = guarded(t, front)
                else:
                    arguments[name] = guarded(t, front)
    how = f"{op} {dtype} {layout} front={front}"
    return Call(op, arguments, f"{how}: {'; '.join(words) or 'good'}", refused)


def _far_resized(r: random.Random, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return few pixels to be made very many, or the other way: outputs that fit into MEMORY."""
    name, image = next(iter(arguments.items()))
    sides = [r.choice([1, 2, 2**10, 2**20]), r.choice([1, 2])]
    few = image.new_ones(1, image.shape[1] // 2 if name == "z" else 1, *r.sample(sides, 2))
    h, w = r.sample([r.choice(SIZES), r.choice([1, 2, 3])], 2)
    changes = {name: few, "h": h, "w": w, "scale_h": None, "scale_w": None}
    return changes | ({"skip": None} if "skip" in arguments else {})


def _spoiled(r: random.Random, op: str, name: str, good: Any) -> tuple[str, Any]:
    one = good[-1] if isinstance(good, list) else good
    if isinstance(one, Tensor):
        kinds = ANY | (IMAGE if name in IMAGES and one.dim() == 4 else CHANNELS)
        kind = r.choice(list(STORAGE if r.random() < 0.4 else kinds))
        return kind, spoiled(good, kinds[kind])
    values = list(numbers(op, name))
    values += REALS if isinstance(good, float) else SIZES if isinstance(good, int) else []
    value = r.choice([*values, None])
    return repr(value), value


def _is_no_eps(name: str, value: Any) -> bool:
    return name.endswith("eps") and isinstance(value, float) and not value >= 0


def run(log: Path, seed: int, first: int, last: int) -> None:
    """Make calls; print how each ended, in a line, with those that ran where they must not."""
    torch.set_num_threads(1)
    with log.open("r+b") as file:
        now = mmap.mmap(file.fileno(), 0)
    for number in range(first, last):
        now[:8] = number.to_bytes(8, "little")
        call = drawn(seed, number)
        text = call.words[:4000]
        now[8 : 16 + len(text)] = len(text).to_bytes(8, "little") + text.encode("ascii")
        # The processor's time: beside other processes the verdict is the same.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with _limited_memory():
                getattr(torch.ops.fastcnn, call.op)(*call.arguments.values())
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            print(type(error).__name__, flush=True)
        except Exception as error:  # which says something about this code, and not about the call
            print(f"{type(error).__name__}, {number}: {text}", flush=True)
        else:
            print(f"ran, and must not, {number}: {text}" if call.refused else "ran", flush=True)


@contextmanager
def _limited_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Found(NamedTuple):
    """What calls came to: by outcome how many, and those that are faults, each in a line."""

    ends: Counter[str]
    faults: list[str]


CODE = "import fastcnn, support.fuzz_calls as calls; calls.main()"


def in_processes(
    folder: Path, seed: int, total: int, at_once: int = 5000, code: str = CODE
) -> Found:
    """Make the calls 0 to total - 1 of a seed, at most so many in a process."""
    found, first = Found(Counter(), []), 0
    log = folder / "call"
    # Without Triton's interpreter, which takes seconds for a call that is valid.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    while first < total:
        last = min(first + at_once, total)
        log.write_bytes(bytes(4096))
        command = [sys.executable, "-c", code, str(log), *map(str, (seed, first, last))]
        done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
        if done.returncode > 0:
            raise RuntimeError(done.stderr)
        lines = done.stdout.splitlines()
        found.faults.extend(line for line in lines if " " in line)
        found.ends.update(line.partition(",")[0] for line in lines)
        first += len(lines)
        if done.returncode == 0:
            continue
        data = log.read_bytes()
        number, length = (int.from_bytes(data[i : i + 8], "little") for i in (0, 8))
        words, how = data[16 : 16 + length].decode(), signal.Signals(-done.returncode).name
        found.faults.append(f"{how}, {number}: {words}")
        found.ends[how] += 1
        first += 1
    return found


def main() -> None:
    """Make the calls that the command line names: log, seed, first, last."""
    log, *integers = sys.argv[1:]
    run(Path(log), *map(int, integers))

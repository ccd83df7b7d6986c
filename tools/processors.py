"""Run all tests as on older processors, then with other random numbers: `make test-processors`.

    python tools/processors.py COMMAND...      the command that runs pytest

Each instruction set below this processor's own is tried with seed 0: oneDNN, PyTorch and fastcnn
are held to it by their environment variables. Then the processor as it is, from five seeds. A set
that it lacks is named, so that nobody takes it for tried.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class InstructionSet(NamedTuple):
    """What holds the three libraries to a set, and flags of /proc/cpuinfo.

    flags: what the set needs. above: with any of these oneDNN has a higher one.
    """

    onednn: str
    aten: str
    fastcnn: str
    flags: frozenset[str]
    above: frozenset[str]

    def environment(self) -> dict[str, str]:
        """Return the variables that the libraries read."""
        return {
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.aten,
            "FASTCNN_CPU_CAPABILITY": self.fastcnn,
        }


AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
BF16 = AVX512 | {"avx512_bf16"}
SETS = [
    InstructionSet("SSE41", "default", "baseline", frozenset({"sse4_1"}), frozenset({"avx"})),
    InstructionSet("AVX2", "avx2", "avx2", AVX2, frozenset({"avx_vnni", "avx512f"})),
    InstructionSet("AVX512_CORE", "avx512", "avx512", AVX512, frozenset({"avx512_vnni"})),
    InstructionSet(
        "AVX512_CORE_BF16", "avx512", "avx512", BF16, frozenset({"avx512_fp16", "amx_tile"})
    ),
]
SEEDS = range(5)


def main(command: list[str]) -> int:
    """Run the command for each set and seed; return 1 if any run failed."""
    has = flags()
    for lacked in [s for s in SETS if not s.flags <= has]:
        say(f"not tried: {lacked.onednn} (this processor lacks {sorted(lacked.flags - has)})")
    runs = [(s.onednn, s.environment(), 0) for s in SETS if s.flags <= has and s.above & has]
    runs += [("as it is", {}, seed) for seed in SEEDS]
    failed = [
        f"{name}, seed {seed}" for name, env, seed in runs if not run(command, name, env, seed)
    ]
    say(
        f"{len(runs) - len(failed)} of {len(runs)} runs passed"
        + "".join(f"\n  failed: {f}" for f in failed)
    )
    return 1 if failed else 0


def flags() -> frozenset[str]:
    """Return what /proc/cpuinfo says this processor has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next(line for line in lines if line.startswith("flags")).split())


def run(command: list[str], name: str, environment: dict[str, str], seed: int) -> bool:
    """Run once and say how it ended."""
    started = time.monotonic()
    command = [*command, f"--seed={seed}", "-q"]
    # inductor keeps code for the set that it met first, under a key that does not name the set.
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, **environment, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    ends = done.stdout.strip().splitlines()[-1:] or ["it printed nothing"]
    say(f"{name}, seed {seed}: {ends[0].strip('= ')}; {time.monotonic() - started:.0f} s")
    if done.returncode != 0:
        print(done.stdout, flush=True)
    return done.returncode == 0


def say(message: str) -> None:
    """Print one line at once."""
    print(f"processors: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

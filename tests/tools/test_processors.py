"""tools/processors.py: which runs it makes of a command, and what it says of failures."""

import itertools
import sys
from pathlib import Path

import processors
import pytest

# In pytest's place: notes how it was called, and fails for one of the seeds.
COMMAND = """
import os, sys
with open({log!r}, "a") as log:
    print(os.environ.get("ONEDNN_MAX_CPU_ISA", ""), os.environ.get("ATEN_CPU_CAPABILITY", ""),
          os.environ.get("FASTCNN_CPU_CAPABILITY", ""), *sys.argv[1:], file=log)
print("details of the run\\n== 7 passed in 3 s ==")
sys.exit("--seed=3" in sys.argv)
"""


def test_every_set_that_is_here_then_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable in processors.SETS[0].environment():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(processors, "flags", lambda: processors.AVX512 | {"sse4_1", "avx"})
    log = tmp_path / "calls"
    assert processors.main([sys.executable, "-c", COMMAND.format(log=str(log))]) == 1
    # AVX512_CORE is what this one is.
    calls = [line.split() for line in log.read_text().splitlines()]
    assert calls == [
        ["SSE41", "default", "baseline", "--seed=0", "-q"],
        ["AVX2", "avx2", "avx2", "--seed=0", "-q"],
        *(["--seed=" + seed, "-q"] for seed in "01234"),
    ]
    said = capfd.readouterr().out
    assert "not tried: AVX512_CORE_BF16 (this processor lacks ['avx512_bf16'])" in said
    assert "AVX2, seed 0: 7 passed in 3 s" in said
    assert "6 of 7 runs passed\n  failed: as it is, seed 3" in said
    assert said.count("details of the run") == 1  # of the one that failed


def test_the_sets_are_those_that_the_libraries_know() -> None:
    # Each needs all that the one before it needs, and /proc/cpuinfo is read as it is here.
    flags = [s.flags for s in processors.SETS[1:]]
    assert all(a <= b for a, b in itertools.pairwise(flags))
    assert "sse2" in processors.flags()

"""Random invalid calls of every operator: test_ops.py says how many."""

from pathlib import Path

import pytest
from support.fuzz_calls import CODE, in_processes
from support.fuzz_cases import TOTALS


@pytest.mark.parametrize("total", TOTALS)
def test_no_invalid_call_ends_the_process(
    total: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # A signal, a minute of the processor's time, or a result where memory is not there.
    seed = int(request.config.getoption("--hypothesis-seed", None) or 0)
    found = in_processes(tmp_path, seed, total)
    print(f"{total} calls: {dict(found.ends)}")
    assert sum(found.ends.values()) == total
    assert not found.faults, f"seed {seed}:\n" + "\n".join(found.faults)


PLANTED = """
import ctypes
def planted(seed, number):
    if number == 3:
        ctypes.string_at(calls.guarded(calls.torch.ones(8)).data_ptr(), 33)
    return calls.Call("batch_norm_act_stats", {"x": calls.torch.ones(2, 3, 4, 4)}, "w", number == 5)
calls.drawn = planted
"""


def test_a_crash_and_a_call_that_must_raise_are_reported(tmp_path: Path) -> None:
    before, after = CODE.split("; ")
    found = in_processes(tmp_path, 0, 7, code=f"{before}\n{PLANTED}\n{after}")
    assert found.ends == {"ran": 6, "SIGSEGV": 1}
    assert found.faults == ["SIGSEGV, 3: w", "ran, and must not, 5: w"]

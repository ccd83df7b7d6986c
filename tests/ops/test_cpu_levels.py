"""The CPU kernels of every instruction set that this processor has below its own.

They are compiled once for each; all other tests run at the highest. Here a process that is held to
a lower one runs those tests again that look at every kernel, on small shapes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import seeds

from fastcnn import _C

LEVELS = _C.cpu_levels.split(",")
BELOW = LEVELS[: LEVELS.index(_C.cpu_capability())]


# The next lower one, and with what takes long those below it.
@pytest.mark.parametrize(
    "level", [*(pytest.param(level, marks=pytest.mark.slow) for level in BELOW[:-1]), *BELOW[-1:]]
)
def test_every_lower_instruction_set(level: str) -> None:
    check = f"from fastcnn import _C; assert _C.cpu_capability() == {level!r}"
    here = Path(__file__).parent
    files = "test_activation.py", "*/test_values.py", "batch_norm_act/test_concat.py"
    tests = [f"{path}" for pattern in files for path in here.glob(pattern)]
    arguments = [*tests, "-q", "-m", "every_level and not slow", "-p", "no:cacheprovider"]
    arguments.append(f"--seed={os.environ[seeds.VARIABLE]}")
    code = f"{check}; import pytest; raise SystemExit(pytest.main({arguments}))"
    env = {**os.environ, "FASTCNN_CPU_CAPABILITY": level}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

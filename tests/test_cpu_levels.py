"""The CPU kernels of every instruction set that this processor has below its own.

They are compiled once for each; all other tests run at the highest. Here a process that is held to
a lower one runs those tests again that look at every kernel, on small shapes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import seeds

from fastcnn import _C

LEVELS = _C.cpu_levels.split(",")
# Of each file what reaches its loops: combinations of types, layouts and activations, and shapes
# that leave a rest behind the last vector.
AGAIN = {
    "test_activation": "accuracy",
    "test_batch_norm_act": "every_combination or slices or 1x3x5x7 or 5x8x13x11",
    "test_group_norm_act": "every_combination or slices or 2x20x9x5",
    "test_dropout": "references and (3x257 or 1x2x96x101)",
    "test_upsample": "every_case or around_the_cache",
    "test_augment": "against_the_reference or masks_follow or one_sample",
    "test_conv2d_int8": "_outputs and (g3 or 2x17x5x5)",
}


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(_C.cpu_capability())])
def test_every_lower_instruction_set(level: str) -> None:
    check = f"from fastcnn import _C; assert _C.cpu_capability() == {level!r}"
    tests = [str(Path(__file__).with_name(f"{name}.py")) for name in AGAIN]
    select = " or ".join(f"({name}.py and ({what}))" for name, what in AGAIN.items())
    arguments = [*tests, "-q", "-k", select, "-m", "not slow", "-p", "no:cacheprovider"]
    arguments.append(f"--seed={os.environ[seeds.VARIABLE]}")
    code = f"{check}; import pytest; raise SystemExit(pytest.main({arguments}))"
    env = {**os.environ, "FASTCNN_CPU_CAPABILITY": level}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

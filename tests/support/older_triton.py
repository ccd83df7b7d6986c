"""Runs Python beside the Triton of torch 2.11, in .venv/older-triton, or beside the newest."""

import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT, TESTS

OLDER = ROOT / ".venv/older-triton"


def run(command: list[str], older: Path | None, **env: str) -> subprocess.CompletedProcess[str]:
    path = {} if older is None else {"PYTHONPATH": str(older)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=TESTS,
        env={**os.environ, **env, **path},
        capture_output=True,
        text=True,
    )

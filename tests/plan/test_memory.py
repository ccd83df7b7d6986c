"""keep_freed_memory: tensors that follow one another take the same pages."""

import platform
import subprocess
import sys

import pytest

# Page faults of writing 20 tensors of 64 MB one after the other, after as many before. These let
# the heap grow to two of them: a freed block fits the next aligned one only with its neighbour.
COUNT = """
import resource, sys, torch, fastcnn
if sys.argv[1] == "keep":
    assert fastcnn.keep_freed_memory() is True
for _ in range(20):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str) -> int:
    command = [sys.executable, "-c", COUNT, argument]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's malloc")
def test_freed_pages_are_used_again() -> None:
    kept, given_back = faults("keep"), faults("default")
    assert given_back >= 20 * 32  # one a page, were the pages huge ones of 2 MiB
    assert kept < 32

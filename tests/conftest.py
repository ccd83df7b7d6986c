"""Settings of the whole test run."""

import os
from collections.abc import Iterator

import pytest

# Threads that wait sleep instead of spinning: beside another busy process, two spinning threads on
# two cores made single tests take minutes. It must be set before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Read where kernels are defined. It must be set before Triton is imported, which torch does late.
# Asked as tests/card.py asks: beside a card, kernels in the interpreter would prove nothing.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Networks, chains and planning, whose tensors are small: a second thread made them slower and took
# a sixth more of the processors' time. The kernels' own tests ask how loops are cut over threads.
ONE_THREAD = ("test_conv_bn_act", "test_convert", "test_models", "test_plan", "test_zoo")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for the tests above, and for each the number that it was."""
    before = torch.get_num_threads()
    if request.path.name.startswith(ONE_THREAD):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Settings of the whole test run."""

import os
from collections.abc import Iterator

import pytest

# Threads that wait sleep instead of spinning: beside another busy process, two spinning threads on
# two cores made single tests take minutes. It must be set before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import seeds
import torch

# Read where kernels are defined. It must be set before Triton is imported, which torch does late.
# Asked as tests/card.py asks: beside a card, kernels in the interpreter would prove nothing.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Networks, chains and planning, whose tensors are small: a second thread made them slower and took
# a sixth more of the processors' time. The kernels' own tests ask how loops are cut over threads.
ONE_THREAD = (
    "test_conv_bn_act", "test_conv2d_bwd_triton", "test_conv2d_folded", "test_conv2d_triton",
    "test_convert", "test_fuzz_chains", "test_gpu_co", "test_gpu_graphs", "test_gpu_ops_conv",
    "test_gpu_plans", "test_models", "test_plan", "test_upsample_conv2d",
    "test_zoo",
)  # fmt: skip


# In order of worth: what a change breaks first, and breaks most, is asked first. Then the others.
FIRST = (
    "test_house", "test_guard", "test_batch_norm_act", "test_group_norm_act", "test_dropout",
    "test_upsample", "test_augment", "test_activation", "test_cancellation", "test_conv_bn_act",
    "test_conv2d", "test_nn", "test_errors", "test_convert", "test_composition",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="of all random numbers (tests/seeds.py)")


def pytest_configure(config: pytest.Config) -> None:
    seeds.use(config.getoption("--seed"))


def pytest_report_header(config: pytest.Config) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"--seed={config.getoption('--seed')}, PyTorch's CPU capability: {capability}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.path.name
        if "_cuda" in name or "_triton" in name:  # the emulator's compilation first
            return len(FIRST)
        return next((i for i, first in enumerate(FIRST) if name.startswith(first)), len(FIRST))

    items.sort(key=rank)  # stable: within a file the order stays


@pytest.fixture(autouse=True)
def seed() -> None:
    seeds.seed_all()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for the tests above, and for each the number that it was."""
    before = torch.get_num_threads()
    if request.path.name.startswith(ONE_THREAD):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Settings of the whole test run."""

import os
from collections.abc import Iterator

import pytest

# Threads that wait sleep instead of spinning: beside another busy process, two spinning threads on
# two cores made single tests take minutes. It must be set before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from support import paths, seeds

# Read where kernels are defined. It must be set before Triton is imported, which torch does late.
# Asked as support/device.py asks: beside a GPU, kernels in the interpreter would show nothing.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# In order of worth: what a change breaks first, and breaks most, is asked first. Then the others.
FIRST = ("project", "ops", "convert", "models")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="of all random numbers (support/seeds.py)")


def pytest_configure(config: pytest.Config) -> None:
    seeds.use(config.getoption("--seed"))


def pytest_report_header(config: pytest.Config) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"--seed={config.getoption('--seed')}, PyTorch's CPU capability: {capability}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        inside = item.path.is_relative_to(paths.TESTS)
        folder = item.path.relative_to(paths.TESTS).parts[0] if inside else ""
        if "_cuda" in item.path.name or "_triton" in item.path.name:
            return len(FIRST)  # the emulator's compilation before what is left
        return FIRST.index(folder) if folder in FIRST else len(FIRST) + 1

    items.sort(key=rank)  # stable: within a file the order stays


@pytest.fixture(autouse=True)
def seed() -> None:
    seeds.seed_all()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: on small tensors a second one costs more than it does, beside another process.

    192 fuzzed chains took 60 s of the processor on one thread, over 430 s on two (AMD EPYC, Zen 3,
    two busy cores). How loops are cut over threads each op's own test asks.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_composite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let converted chains run the kernels for the small images of most tests, too."""
    from fastcnn.ops.conv_bn_act import composite

    monkeypatch.setattr(composite, "MOST_VALUES", {})

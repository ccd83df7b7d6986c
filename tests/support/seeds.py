"""Random numbers of the tests: all are a function of `pytest --seed`, 0 by default.

A test's verdict must not hang on them (tolerance.py): `make test-processors` runs five seeds.
conftest.py seeds torch, numpy and random before every test; what wants draws of its own takes
`seeded`.
"""

import os
import random

import numpy as np
import torch

DROPOUT_SEED = -(2**62) - 12345  # what dropout is called with: negative, all 64 bits of it count
VARIABLE = "FASTCNN_TEST_SEED"  # in the environment, so that processes that tests start have it too


def use(seed: int) -> None:
    """Set what `--seed` says, before any test is collected."""
    os.environ[VARIABLE] = str(seed)


def seed_all(stream: int = 0) -> None:
    """Seed every global generator that tests draw from."""
    torch.manual_seed(_of(stream))
    np.random.seed(_of(stream) % 2**32)  # noqa: NPY002
    random.seed(_of(stream))


def seeded(stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator of its own; another one for each stream, and for each `--seed`."""
    return torch.Generator(device).manual_seed(_of(stream))


def _of(stream: int) -> int:
    return (
        1_000_003 * int(os.environ.get(VARIABLE, 0)) + stream
    )  # with seed 0, the stream's number itself

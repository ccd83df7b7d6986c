"""The check that torch is new enough, before anything of torch is used."""

import re

OLDEST = (2, 11)


def check_torch(torch_version: str, fastcnn_version: str) -> None:
    """Raise ImportError naming both versions where torch is older than fastcnn needs."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise ImportError(
            f"fastcnn {fastcnn_version} needs torch {OLDEST[0]}.{OLDEST[1]} or later, "
            f"found torch {torch_version}: run pip install 'torch>={OLDEST[0]}.{OLDEST[1]}'"
        )

"""A benchmark's row as it is written down, of synthetic times."""

from typing import Any

import records

# Rounds of three candidates and a copy: ms 2, 3, 4 and so on.
TIMES = {
    "ours": [2e-3, 2e-3, 4e-3, 2e-3],
    "ours, graph": [1e-3, 1e-3, 1e-3, 1e-3],
    "eager": [6e-3, 6e-3, 12e-3, 6e-3],
    "compiled": [3e-3, 3e-3, 6e-3, 3e-3],
    "copy": [1e-3, 1e-3, 2e-3, 1e-3],
}


def row(file: str, test: str, case: str, **more: Any) -> dict[str, Any]:
    return {
        "file": f"bench_{file}",
        "test": f"test_{test}",
        "case": case,
        "device": "synthetic",
        **records.measured({k: v for k, v in TIMES.items() if k != "ours, graph"}, 3, 10**6, 8),
        **more,
    }

"""Make the plans of a run on a GPU the default ones.

    python tools/gpu/adopt.py RESULTS/plans.json

A plan's key names its device, so that those of several GPUs stand side by side; of the same
problem the newer one stays. They count where the plan file has none (docs/planning.md).
"""

import json
import sys
from pathlib import Path

MEASURED = Path(__file__).resolve().parents[2] / "fastcnn" / "plan" / "measured.json"


def adopt(plans: Path, measured: Path = MEASURED) -> int:
    """Add a plan file's entries; return how many there are then.

    Raises:
        ValueError: the files are of different schemas.
    """
    new, found = (json.loads(path.read_text()) for path in (plans, measured))
    if new["schema"] != found["schema"]:
        raise ValueError(f"{plans}: expected schema {found['schema']}, got {new['schema']}")
    found["plans"] = dict(sorted((found["plans"] | new["plans"]).items()))
    measured.write_text(json.dumps(found, indent=1) + "\n")
    return len(found["plans"])


if __name__ == "__main__":
    print(f"{adopt(Path(sys.argv[1]))} default plans")

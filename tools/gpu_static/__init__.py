"""What the compiled GPU code says about its speed where there is no GPU: `make sass`."""

import sys
from pathlib import Path

# Where support is: the cases that are compiled, and torchvision as the tests have it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

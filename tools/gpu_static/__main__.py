"""Write docs/gpu-static.md: what the compiled code of all GPU kernels says about their speed.

    PYTHONPATH=tools python -m gpu_static [--accept]

--accept also writes what is asked and not reached today to known_misses.json.
"""

import json
import sys
from pathlib import Path

from fastcnn import _C
from gpu_static import matrix, networks, page
from gpu_static.kernels import ROOT, row_of
from gpu_static.known import FILE, compiler, found_misses
from gpu_static.sass import functions


def main() -> None:
    """Read the library that is installed, and compile Triton's kernels."""
    if not _C.cuda_archs:
        raise SystemExit("expected a build with CUDA kernels, got one without: is nvcc on PATH?")
    rows = [row_of(f) for f in functions(Path(_C.__file__).with_name("_ops.so"))]
    products = matrix.rows()
    (ROOT / "docs" / "gpu-static.md").write_text(page.text(rows, products, networks.steps(rows)))
    if "--accept" in sys.argv:
        misses = {**found_misses(rows), **found_misses(products)}
        FILE.write_text(json.dumps({"compiler": compiler(), "misses": misses}, indent=1) + "\n")


if __name__ == "__main__":
    main()

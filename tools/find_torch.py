"""Print the folder of the installed torch for CMakeLists.txt, or say in one sentence what to do."""

import importlib.util
import pathlib
import re
import sys

COMMAND = "pip install 'torch>=2.11' scikit-build-core pybind11 ninja && "
COMMAND += "pip install --no-build-isolation ."

spec = importlib.util.find_spec("torch")  # finds it without the seconds that importing it takes
if spec is None or spec.origin is None:
    sys.exit(f"fastcnn builds against your own torch, and there is none here: run {COMMAND}")
folder = pathlib.Path(spec.origin).parent
found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
if found is None or (int(found[2]), int(found[3])) < (2, 11):
    version = found[1] if found else "an unknown version"
    sys.exit(f"fastcnn expected torch 2.11 or later, got {version}: run {COMMAND}")
print(folder)

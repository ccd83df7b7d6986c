"""The operators' CUDA implementations with emulated kernels, loaded beside _ops.so.

The torch glue and the kernels of csrc are compiled by g++ against the emulator's headers (build.py)
and registered under the dispatch key PrivateUse1, to be called with CPU tensors. Only what tells of
a GPU, CudaCall, is another one: 3 multiprocessors, no stream. What a call gets and returns, how
much workspace it allocates, what it refuses, and the Python above it, run as on a GPU.
"""

import functools
from pathlib import Path

import torch
from cuda_emu import build

HERE = Path(__file__).parent / "in_torch"
# What a kernel does not need, as a word of a residual that is not there, it passes on unset.
FLAGS = [*build.STANDARD, "-Wno-maybe-uninitialized"]
FLAGS += ["-fPIC", "-fvisibility=hidden", "-DFASTCNN_EMULATED_IN_TORCH"]
KEY = "PrivateUse1"


@functools.cache
def load() -> None:
    """Build the library, unless it is there from the same text, and load it."""
    torch.ops.load_library(build_library())


def build_library() -> Path:
    csrc, torch_dir = build.ROOT / "csrc", Path(torch.__file__).parent
    glue = [path for path in sorted(csrc.glob("*.cpp")) if "(fastcnn, CUDA, m)" in path.read_text()]
    kernels = [HERE / "cuda_call.cpp", *sorted((csrc / "cuda").rglob("*.cu"))]
    include = ["-I", str(HERE), "-I", str(csrc), "-isystem", str(torch_dir / "include")]
    include += ["-isystem", str(build.find_cuda_include())]
    # CMakeLists.txt's; and the headers' version, for the key.
    define = ["-DFASTCNN_WITH_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    define += [f'-DTORCH_HEADERS="{torch.__version__}"']
    command = [build.find_gxx(), *FLAGS, *define, *include]
    as_glue = ["-include", str(HERE / "library.h")]
    sources = [(source, [*command, *build.AS_CUDA]) for source in kernels]
    sources += [(source, [*command, *as_glue]) for source in glue]
    objects = build.compile_all(sources, Path("library"))
    link = ["-shared", "-Wl,-z,defs", *map(str, objects), str(torch_dir / "lib/libtorch_cpu.so")]
    return build.build([build.find_gxx(), *link], objects, Path("library/emulated.so"))

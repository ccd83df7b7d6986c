"""What nvcc made of the CUDA kernels: no spill, enough registers, 16-byte accesses.

Read from the library that is installed: machine code of all architectures it is built for, and PTX,
from which all of them are assembled (no source asks for __CUDA_ARCH__).
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from gpu.sanitize import kernels as kernels_of_the_sources
from support.paths import ROOT

from fastcnn import _C

REGISTER_FILE = 65536  # of an SM, on every architecture so far
UNROLL = 4  # kUnroll: the vectors that a thread has in flight
LIBRARY = Path(_C.__file__).with_name("_ops.so")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = pytest.mark.skipif(
    not _C.cuda_archs,
    reason="built without nvcc: the CUDA kernels are NOT compiled here; CI has an nvcc. What they "
    "compute is tested without one, in tests/ops/*/test_cuda.py.",
)


@dataclass
class Kernel:
    """One instantiation: what ptxas made of it for a GPU, and its PTX."""

    arch: str
    name: str  # demangled, without its parameters
    registers: int
    used_bytes: list[int]  # of stack, where registers are spilled, and of local memory
    ptx: str

    def __str__(self) -> str:
        return f"{self.name} for {self.arch}"

    @property
    def vector(self) -> int:
        """kVector: the last template argument but the layout, if any; 1 where there is none."""
        arguments = re.search(r"<\w+, (\d+)(?:, (?:true|false))?>$", self.name)
        return int(arguments[1]) if arguments else 1

    @property
    def walks(self) -> bool:
        """Whether it reads several vectors at a time, and not row by row or tap by tap."""
        return not self.name.startswith(("upsample_fwd", "depthwise_conv2d_pixel"))


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def bodies(ptx: str) -> dict[str, str]:
    return dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx, re.DOTALL))


USED = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    ptx = bodies(run(CUOBJDUMP, "--dump-ptx", LIBRARY))
    found = []
    for part in run(CUOBJDUMP, "--dump-resource-usage", LIBRARY).split("Fatbin elf code")[1:]:
        arch = re.search(r"arch = (sm_\d+)", part)
        assert arch, part[:200]
        used = USED.findall(part)
        assert len(used) == part.count("Function ")
        names = run("c++filt", *(mangled for mangled, *_ in used)).splitlines()
        for name, (mangled, registers, stack, local) in zip(names, used, strict=True):
            name = re.sub(r"^void |fastcnn::|\(anonymous namespace\)::", "", name).split("(")[0]
            found.append(
                Kernel(arch[1], name, int(registers), [int(stack), int(local)], ptx[mangled])
            )
    return found


def test_every_kernel_is_compiled_for_every_architecture(kernels: list[Kernel]) -> None:
    archs = {f"sm_{arch}" for arch in re.findall(r"(\d+)(?!\d|-virtual)", _C.cuda_archs)}
    assert archs
    for arch in archs:
        assert {k.name.split("<")[0] for k in kernels if k.arch == arch} == kernels_of_the_sources()
    assert {k.arch for k in kernels} == archs
    sources = ROOT / "csrc"
    assert not [path for path in sources.rglob("*.*") if "__CUDA_ARCH__" in path.read_text()]


def test_nothing_is_in_local_memory(kernels: list[Kernel]) -> None:
    # An array indexed by something unknown at compile time, or too many values at once: each access
    # would then go to memory, beside the ones that the kernel is for.
    assert [f"{k}: {k.used_bytes} bytes" for k in kernels if any(k.used_bytes)] == []


def test_registers_leave_room_for_a_block(kernels: list[Kernel]) -> None:
    # A block of more registers than there are fails at launch, with cudaErrorLaunchOutOfResources.
    # Without __launch_bounds__ a block may have 1024 threads: 64 registers each.
    for kernel in kernels:
        bounds = re.search(r"\.maxntid (\d+)", kernel.ptx)
        threads = int(bounds[1]) if bounds else 1024
        registers = -(-kernel.registers // 8) * 8  # as they are given out
        assert threads * registers <= REGISTER_FILE, f"{kernel}: {registers} x {threads} threads"


# An atomic operation, its qualifiers, and the type that it works on.
ATOMIC = re.compile(r"\b(?:atom|red)\.([\w.:]+)\.(\w+)\s")


def float_atomics(ptx: str) -> list[str]:
    """The atomic operations of some PTX that add floats, or may: compare-and-swap is how one adds
    those that the GPU has no instruction for."""
    found = []
    for match in ATOMIC.finditer(ptx):
        operation, kind = match[1].split("."), match[2]
        if "cas" in operation or not re.fullmatch(r"[usb]\d+", kind):
            found.append(match[0].strip())
    return found


def calls(ptx: str) -> bool:
    return re.search(r"^\s*call\b", ptx, re.MULTILINE) is not None


def test_no_float_is_added_atomically(kernels: list[Kernel]) -> None:
    # The order in which blocks arrive would decide about the last bits of every sum.
    assert {str(k): found for k in kernels if (found := float_atomics(k.ptx))} == {}
    assert not [str(k) for k in kernels if calls(k.ptx)], "what they call was not looked at"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_planted_float_atomics_are_found(tmp_path: Path) -> None:
    planted = {
        "adds_float": "atomicAdd(static_cast<float*>(y), 1.0f)",
        "adds_double": "(void)atomicAdd(static_cast<double*>(y), 1.0)",
        "adds_bfloat16": "atomicAdd(static_cast<__nv_bfloat16*>(y), __nv_bfloat16(1.0f))",
        "adds_half2": "atomicAdd(static_cast<__half2*>(y), __half2(1.0f, 1.0f))",
        "returns": "static_cast<float*>(y)[1] = atomicAdd(static_cast<float*>(y), 1.0f)",
        "largest": "atomicMax(static_cast<int*>(y), 1)",  # of integers: any order will do
        "counts": "atomicAdd(static_cast<unsigned*>(y), 1u)",
        "calling": "add(static_cast<float*>(y))",  # in a function it is not seen, but the call is
    }
    source, out = tmp_path / "planted.cu", tmp_path / "planted.ptx"
    source.write_text(
        "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
        "__device__ __noinline__ void add(float* y) { atomicAdd(y, 1.0f); }\n"
        + "".join(
            f'extern "C" __global__ void {name}(void* y) {{ {code}; }}\n'
            for name, code in planted.items()
        )
    )
    run("nvcc", "-ptx", "-arch=sm_90", source, "-o", out)
    ptx = bodies(out.read_text())
    found = {name for name in planted if float_atomics(ptx[name])}
    assert found == set(planted) - {"largest", "counts", "calling"}
    assert [name for name in planted if calls(ptx[name])] == ["calling"]


def test_vectors_move_as_16_bytes(kernels: list[Kernel]) -> None:
    vectors = [k for k in kernels if k.vector > 1 and k.walks]
    assert vectors
    for kernel in vectors:
        loads = re.findall(r"ld\.global(?:\.\w+)*?\.v4\.[a-z]32", kernel.ptx)
        stores = re.findall(r"st\.global(?:\.\w+)*?\.v4\.[a-z]32", kernel.ptx)
        assert len(loads) > UNROLL, f"{kernel}: {len(loads)} 16-byte loads"
        # Image elements of half types have 2 bytes, per-channel numbers 4.
        assert not re.search(r"(ld|st)\.global[.\w]*\.[bu]16", kernel.ptx), str(kernel)
        sums_alone = "stats" in kernel.name or re.search("(group|pixel)_norm_act_red", kernel.name)
        if not sums_alone:
            assert stores, f"{kernel}: no 16-byte store"


def test_blended_rows_move_as_16_bytes(kernels: list[Kernel]) -> None:
    # Their outputs always; their inputs where channels lie side by side: along a row of NCHW each
    # output has its own two pixels.
    blends = [k for k in kernels if k.vector > 1 and not k.walks]
    assert blends
    for kernel in blends:
        assert re.search(r"st\.global(?:\.\w+)*?\.v4\.[a-z]32", kernel.ptx), str(kernel)
        if kernel.name.endswith("true>"):
            assert re.search(r"ld\.global(?:\.\w+)*?\.v4\.[a-z]32", kernel.ptx), str(kernel)
            assert not re.search(r"(ld|st)\.global[.\w]*\.[bu]16", kernel.ptx), str(kernel)


def test_augmented_images_are_stored_as_16_bytes(kernels: list[Kernel]) -> None:
    # Its loads are single bytes, at places that no one can align.
    wide = [k for k in kernels if re.match(r"augment_kernel<\w+, [48], [13]>", k.name)]
    assert len(wide) == 6 * len({k.arch for k in kernels})
    for kernel in wide:
        assert re.search(r"st\.global(?:\.\w+)*?\.v4\.[a-z]32", kernel.ptx), str(kernel)
        assert not re.search(r"st\.global[.\w]*\.[bu]16", kernel.ptx), str(kernel)


def test_unrolled_loads_are_in_flight_together(kernels: list[Kernel]) -> None:
    # The x of kUnroll vectors are asked for before the first is stored or the block branches:
    # else a thread waits for memory once a vector.
    for kernel in (k for k in kernels if k.vector > 1 and k.walks):
        blocks = re.split(r"\bbra\b|\$L__BB\w+:|\bst\.global", kernel.ptx)
        together = max(len(re.findall(r"ld\.global[.\w]*\.v4", block)) for block in blocks)
        assert together >= UNROLL, f"{kernel}: at most {together} loads between branches or stores"

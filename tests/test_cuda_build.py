"""What nvcc makes of the CUDA kernels: no warning, no spill, enough registers, 16-byte accesses."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90")  # what CMakeLists.txt builds where there is no card to ask
REGISTER_FILE = 65536  # of an SM, on every architecture so far
UNROLL = 4  # kUnroll: the vectors that a thread has in flight

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None,
    reason="no nvcc on PATH: this machine cannot compile CUDA, so these kernels are NOT compiled "
    "here; CI has an nvcc. What they compute is tested without one, in test_*_cuda.py.",
)


@dataclass
class Kernel:
    """One instantiation: what ptxas reports for it, and its PTX."""

    source: str
    arch: str
    name: str  # demangled, without its parameters
    registers: int
    used_bytes: list[int]  # stack frame, spill stores, spill loads, local memory
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
        """Whether it reads several vectors at a time; upsample's forward reads row by row."""
        return "upsample_fwd" not in self.name


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """Compile each source for each architecture, with the build's flags, two at a time."""
    folder = tmp_path_factory.mktemp("nvcc")
    jobs = [(source, arch, folder / arch / source.stem) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        found = [kernel for kernels in pool.map(lambda job: compile_one(*job), jobs)
                 for kernel in kernels]  # fmt: skip
    assert found
    return found


def compile_one(source: Path, arch: str, folder: Path) -> list[Kernel]:
    folder.mkdir(parents=True)
    command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", f"-I{CSRC}", f"-arch={arch}", "-cubin"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", "--Werror=all-warnings", "-Xptxas=-v"]
    command += ["--keep", f"--keep-dir={folder}", "-o", f"{folder}/kernels.cubin", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptx = (folder / f"{source.stem}.ptx").read_text()  # kept: what ptxas was given
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx, re.DOTALL))
    reports = re.split(r"Compiling entry function '(\w+)'", done.stderr)[1:]
    reports_of = dict(zip(reports[::2], reports[1::2], strict=True))
    assert reports_of.keys() == bodies.keys()
    names = subprocess.run(
        ["c++filt", *bodies], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = []
    for mangled, name in zip(bodies, names, strict=True):
        report = reports_of[mangled]
        registers = re.search(r"Used (\d+) registers", report)
        assert registers, report
        used = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads|lmem)", report)
        assert len(used) >= 3, report
        name = re.sub(r"^void |fastcnn::|\(anonymous namespace\)::", "", name).split("(")[0]
        found.append(
            Kernel(source.name, arch, name, int(registers[1]), [int(b) for b in used],
                   bodies[mangled])
        )  # fmt: skip
    return found


def test_every_source_is_compiled_for_every_architecture(kernels: list[Kernel]) -> None:
    assert {(k.source, k.arch) for k in kernels} == {(s.name, a) for s in SOURCES for a in ARCHS}


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
    those that the card has no instruction for."""
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


@pytest.mark.parametrize("arch", ARCHS)
def test_planted_float_atomics_are_found(tmp_path: Path, arch: str) -> None:
    planted = {
        "adds<float>": "atomicAdd(static_cast<float*>(y), 1.0f)",
        "adds<double>": "(void)atomicAdd(static_cast<double*>(y), 1.0)",
        "adds<__nv_bfloat16>": "atomicAdd(static_cast<__nv_bfloat16*>(y), __nv_bfloat16(1.0f))",
        "adds<__half2>": "atomicAdd(static_cast<__half2*>(y), __half2(1.0f, 1.0f))",
        "returns": "static_cast<float*>(y)[1] = atomicAdd(static_cast<float*>(y), 1.0f)",
        "largest": "atomicMax(static_cast<int*>(y), 1)",  # of integers: any order will do
        "counts": "atomicAdd(static_cast<unsigned*>(y), 1u)",
    }
    source = tmp_path / "planted.cu"
    names = {name: re.sub(r"\W", "_", name) for name in planted}
    source.write_text(
        "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
        + "".join(f"__global__ void {names[k]}(void* y) {{ {code}; }}\n"
                  for k, code in planted.items())
    )  # fmt: skip
    kernels = compile_one(source, arch, tmp_path / arch)
    assert {k.name for k in kernels if float_atomics(k.ptx)} == set(names.values()) - {
        "largest", "counts",
    }  # fmt: skip
    # In a function beside the kernel it is not seen, but the call is.
    source.write_text(
        "__device__ __noinline__ void add(float* y) { atomicAdd(y, 1.0f); }\n"
        "__global__ void calling(float* y) { add(y); }\n"
    )
    assert [k.name for k in compile_one(source, arch, tmp_path / "calls") if calls(k.ptx)]
    assert not [k for k in kernels if calls(k.ptx)]


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
    assert len(wide) == 6 * len(ARCHS)
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

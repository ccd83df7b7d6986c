"""The CUDA emulation itself: it runs correct kernels correctly, and it catches each planted defect.

Every kernel test without a GPU rests on this: an emulation that lets a defect through would show
nothing. The kernels are in cuda_emu/planted/.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emu import build

PLANTED = Path(build.__file__).parent / "planted"


@pytest.fixture(scope="session")
def planted() -> Path:
    # Three files, each with the header in front, as in an op's runner: they must link.
    sources = [PLANTED / name for name in ("main.cpp", "block_sum.cu", "behaviour.cu")]
    return build.build_runner(sources, Path("planted"))


def run(program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *map(str, args)], capture_output=True, text=True, check=False, timeout=60
    )


def output(program: Path, *args: object) -> str:
    done = run(program, *args)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# --- Correct kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "blocks", "threads"),
    [
        (0, 1, 32),  # nobody adds anything
        (1, 1, 32),  # one warp: the second stage reads one sum
        (33, 3, 64),  # the last block has nothing to do
        (4099, 5, 96),  # a number of warps that is no power of two
        (65535, 64, 256),  # the usual block: the loop over the grid turns for almost all threads
        (5000, 2, 1024),  # the largest block
    ],
)
def test_block_sum(planted: Path, n: int, blocks: int, threads: int) -> None:
    assert int(output(planted, "block_sum", n, blocks, threads)) == n * (n + 1) // 2


def test_collectives(planted: Path) -> None:
    lines = output(planted, "collectives").splitlines()
    rows = [[int(value) for value in line.split()] for line in lines]
    lanes = range(32)
    low, high = ([lane % 5 == 0 for lane in half] for half in (range(16), range(16, 32)))
    ballots = [sum(bit << lane for lane, bit in enumerate(half)) for half in (low, high)]
    assert rows == [
        [100 + (lane + 3) % 32 for lane in lanes],  # the source lane counts modulo 32
        [100 + (lane ^ 5) for lane in lanes],
        [
            100 + (lane + 30 if lane + 30 < 32 else lane) for lane in lanes
        ],  # past the end: the own value
        [100 + (lane - 30 if lane >= 30 else lane) for lane in lanes],
        [-65] * 32,  # doubles move all eight bytes
        # Two masks at one call: lane 3 is in the lower half, and the lanes >= 16 are the upper one.
        [ballots[lane // 16] * 4 + (2 if lane < 16 else 1) for lane in lanes],
    ]


def test_indices(planted: Path) -> None:
    # One decimal digit for each index; x runs fastest, as on hardware.
    places = [(bz, by, bx, z, y, x) for bz in range(2) for by in range(4) for bx in range(2)
              for z in range(2) for y in range(2) for x in range(3)]  # fmt: skip
    expected = [int("".join(map(str, place))) for place in places]
    assert [int(value) for value in output(planted, "indices").split()] == expected


def test_shared_memory_is_poisoned_for_each_block(planted: Path) -> None:
    # A kernel which forgets to initialise must not profit from zeros, nor from what the block
    # before has left.
    assert output(planted, "poison").split() == ["-1", "-1", "-1"]


def test_exited_threads_do_not_count_for_syncthreads(planted: Path) -> None:
    # So it is since Volta; kernels with `if (i >= n) return;` at the top rely on it.
    assert [int(value) for value in output(planted, "early_exit").split()] == list(
        reversed(range(40))
    )


def test_intrinsics(planted: Path) -> None:
    assert [float(value) for value in output(planted, "intrinsics").split()] == [
        0xDEADBEEF * 0xCAFEF00D >> 32,
        0xFEDCBA9876543210 * 0x10 >> 64,
        1 / 4 + 2 + 1 / 8,
        2 * 2**-12 + 2**-24,  # exact: with two roundings the last term would be lost
        0xC0000000 + 1.5,
        -4 + 5 + 0.5 + 0.25,  # like fminf, min and max of floats ignore a NaN
        1 + 65504,  # bf16 rounds 1 + 2**-8 to even; 65504 is the largest half
        3.5 + 1 + 40,  # atomicAdd returns what was there,
        42,  # and has added 2
    ]


def test_empty_tensor(planted: Path) -> None:
    # It has a null pointer, which UBSan does not let memset have, not even for 0 bytes.
    assert output(planted, "empty_tensor") == ""


def test_device(planted: Path) -> None:
    # Device 0 with 3 multiprocessors, so that grids sized by them are smaller than most tensors.
    assert output(planted, "device").split() == ["0", "3", str(227 * 1024)]


def test_launch_limits(planted: Path) -> None:
    # The hardware's own error codes, so that a launcher's error path is the one users get.
    configuration, argument = "invalid configuration argument", "invalid argument"
    assert output(planted, "launch_limits").splitlines() == [
        *[configuration] * 6,  # 1025 threads; 32 * 33; z = 65; no thread; no block; grid y = 65536
        f"then: {configuration}",
        "then: no error",  # cudaGetLastError clears
        argument,  # more than 48 KiB of shared memory without asking first
        f"228 KiB: {argument}",
        "227 KiB: no error",
        argument,
    ]


# --- Planted defects ------------------------------------------------------------------------------


# Parentheses stand for themselves in a message, `...` for anything.
@pytest.mark.parametrize(
    ("case", "message"),
    [
        # AddressSanitizer, on each kind of memory. The stack: arrays of a thread, also after a
        # switch of fibers.
        ("global_out_of_bounds", "heap-buffer-overflow...READ of size 4...in copy_kernel"),
        ("shared_out_of_bounds", "heap-buffer-overflow...WRITE of size 4...right of 124-byte"),
        ("stack_out_of_bounds", "stack-buffer-overflow...in stack_out_of_bounds_kernel"),
        ("shared_not_asked_for", "shared memory, but was launched with dynamicSmemBytes = 0"),
        # UBSan. A vector load at an odd address is an error on hardware; int offsets overflow in
        # large tensors.
        ("misaligned", "misaligned address ... 'const struct float4', which requires 16 byte"),
        ("overflow", "signed integer overflow: 65536 * 32768"),
        # Warp collectives that are undefined on hardware, where they often seem to work.
        ("lane_exited", "__shfl_xor_sync mask 0xffffffff names lane 17, which has exited"),
        ("partial_warp", "thread (32,0,0): ... names lane 18, which the block does not have"),
        ("own_bit_missing", "mask 0xfffffff7 does not name the calling lane 3"),
        ("source_not_named", "mask 0x0000ffff does not name lane 16, whose value is read"),
        ("masks_differ", "waits for lane 16, which waits at __ballot_sync mask 0xfffffffe"),
        # Barriers that part of the threads never reach. On hardware: a hang, or worse, none.
        ("deadlock", "deadlock: __syncwarp ... waits for lane 0, which waits at __syncthreads"),
        ("two_barriers", "thread (32,0,0): waits at __syncthreads ... others of its block at"),
        # Results that depend on the order: of lanes, of blocks, and where both simple orders agree.
        ("no_syncwarp", "under schedule 1: the result depends on the order of the threads"),
        ("blocks_depend", "byte 4 of 16 of y is 0x01 under schedule 0 and 0xff under schedule 1"),
        ("neighbours", "of y is 0x01 under schedule 0 and 0x00 under schedule"),
        # -1 is also the first poison, so the forgotten byte is the only one that may be reported.
        ("never_written", "byte 7 of 8 of y was never written"),
        # Ignoring it would run another kernel than the hardware does.
        ("cluster", "launch attribute 4 is not emulated"),
    ],
)
def test_planted_defect(planted: Path, case: str, message: str) -> None:
    done = run(planted, case)
    assert done.returncode != 0
    assert re.search(re.escape(message).replace(r"\.\.\.", ".*"), done.stderr, re.DOTALL), (
        done.stderr
    )


@pytest.mark.parametrize("threads", [64, 256])
def test_missing_syncthreads(planted: Path, threads: int) -> None:
    # The defect the schedules are for: in ascending order the first warp reads sums that are not
    # yet there.
    done = run(planted, "no_barrier", 999, 3, threads)
    assert done.returncode == 86
    assert "of sum is 0x" in done.stderr
    assert "a barrier is missing" in done.stderr


def test_what_is_not_offered_does_not_compile() -> None:
    source = PLANTED / "not_offered.cu"
    command = [*build.compile_command(), "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = "\n".join(line for line in done.stderr.splitlines() if ": error: " in line)
    assert (
        "error_use_shared_memory_from_common_shared_memory_cuh" in errors
    )  # would be one variable for all blocks
    assert "use of deleted function" in errors
    assert "__activemask()" in errors  # its answer is the compiler's choice
    assert (
        "atomicAdd(float*, float)" in errors
    )  # the order of float additions would change the bits
    assert "CUDA shuffles 4 or 8 byte numbers" in errors  # nvcc would promote a short to int


# --- build.py -------------------------------------------------------------------------------------


def test_build_compiles_once_for_each_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, source, compiler = tmp_path / "log", tmp_path / "answer.cpp", tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo compiled >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "compile_command", lambda: [str(compiler)])
    source.write_text("int main() { return 41; }")

    with ThreadPoolExecutor(4) as pool:  # as several pytest processes would
        programs = list(
            pool.map(lambda _: build.build_runner([source], tmp_path / "answer"), range(4))
        )
    assert [run(program).returncode for program in programs] == [41] * 4
    assert log.read_text().count("compiled") == 1

    source.write_text("int main() { return 42; }")
    assert run(build.build_runner([source], tmp_path / "answer")).returncode == 42

    source.write_text("int main() { return forty_three; }")
    with pytest.raises(RuntimeError, match=r"forty_three.* was not declared"):
        build.build_runner([source], tmp_path / "answer")


def test_cuda_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_only, complete = tmp_path / "runtime_only", tmp_path / "complete"
    for header in ("cuda_runtime.h", "crt/host_config.h", "nv/target"):
        (complete / header).parent.mkdir(parents=True, exist_ok=True)
        (complete / header).touch()
    runtime_only.mkdir()
    (runtime_only / "cuda_runtime.h").touch()  # one wheel of the three: passed over

    monkeypatch.setattr(build, "_cuda_include_candidates", lambda: iter([runtime_only, complete]))
    assert build.find_cuda_include() == complete
    monkeypatch.setattr(build, "_cuda_include_candidates", lambda: iter([runtime_only]))
    with pytest.raises(
        RuntimeError, match="pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    ):
        build.find_cuda_include()

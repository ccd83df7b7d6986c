"""The wheel: what its libraries need of a system, and what its name says of that."""

import base64
import csv
import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import build_wheel
import pytest
from support.paths import ROOT

from fastcnn import _C

LIBRARIES = sorted(Path(_C.__file__).parent.glob("*.so"))
NAME = "fastcnn-0.1.0-cp311-cp311-linux_x86_64.whl"
# What binutils prints of a library that was built on glibc 2.36 with GCC 12.
OBJDUMP = """
Dynamic Section:
  NEEDED               libtorch_cpu.so
  NEEDED               libc.so.6

Version References:
  required from libgcc_s.so.1:
    0x0b792650 0x00 14 GCC_3.0
    0x0cac6d60 0x00 07 GCC_12.0.0
  required from libc.so.6:
    0x069691b4 0x00 05 GLIBC_2.34
    0x09691a75 0x00 02 GLIBC_2.2.5

DYNAMIC SYMBOL TABLE:
0000000000000000      DF *UND*	0000000000000000 (GCC_12.0.0) __extendhfsf2
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.34) pthread_create
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.2.5) malloc
"""


def test_there_are_libraries() -> None:
    assert {path.name.split(".")[0] for path in LIBRARIES} == {"_C", "_ops"}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_run_wherever_torch_does(library: Path) -> None:
    assert build_wheel.beyond_policy(library) == []


def answer(monkeypatch: pytest.MonkeyPatch, told: str) -> list[str]:
    """Return what is beyond the policy where objdump tells this."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, told)

    monkeypatch.setattr(subprocess, "run", run)
    return build_wheel.beyond_policy(Path("_ops.so"))


def test_newer_symbols_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(monkeypatch, OBJDUMP) == [
        "__extendhfsf2 of GCC_12.0.0 in _ops.so",
        "pthread_create of GLIBC_2.34 in _ops.so",
    ]
    # As numbers: 2.4 is older than 2.28.
    older = OBJDUMP.replace("GCC_12.0.0", "GCC_4.8.0").replace("GLIBC_2.34", "GLIBC_2.4")
    assert answer(monkeypatch, older) == []
    newest = OBJDUMP.replace("GCC_12.0.0", "GCC_7.0.0").replace("GLIBC_2.34", "GLIBC_2.28")
    assert answer(monkeypatch, newest) == []


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ("GLIBC_PRIVATE", "pthread_create of GLIBC_PRIVATE in _ops.so"),
        ("GOMP_4.0", "pthread_create of GOMP_4.0 in _ops.so"),
        ("GLIBC_ABI_DT_RELR", "pthread_create of GLIBC_ABI_DT_RELR in _ops.so"),
    ],
)
def test_versions_without_a_limit_are_beyond_it(
    monkeypatch: pytest.MonkeyPatch, instead: str, said: str
) -> None:
    told = OBJDUMP.replace("GCC_12.0.0", "GCC_3.4").replace("GLIBC_2.34", instead)
    assert answer(monkeypatch, told) == [said]


def test_libraries_that_are_not_everywhere_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = OBJDUMP.replace("GCC_12.0.0", "GCC_3.4").replace("GLIBC_2.34", "GLIBC_2.3")
    told = told.replace("libc.so.6\n\n", "libc.so.6\n  NEEDED               libcudart.so.13\n\n")
    assert answer(monkeypatch, told) == ["_ops.so needs libcudart.so.13"]


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, newer: list[str]) -> Path:
    """Let the tool build, of which pip's part is a wheel of one library."""

    def pip(command: list[str]) -> subprocess.CompletedProcess[str]:
        assert command[-1] == str(ROOT)
        with zipfile.ZipFile(Path(command[-2]) / NAME, "w") as made:
            made.writestr("fastcnn/_ops.so", b"library")
            made.writestr("fastcnn-0.1.0.dist-info/WHEEL", "Tag: cp311-cp311-linux_x86_64\n")
            record = "fastcnn/_ops.so,sha256=x,7\nfastcnn-0.1.0.dist-info/WHEEL,sha256=y,1\n"
            made.writestr("fastcnn-0.1.0.dist-info/RECORD", record)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(build_wheel, "beyond_policy", lambda library: newer)
    build_wheel.main(str(folder))
    (built,) = folder.iterdir()
    return built


def test_the_platform_is_in_the_name_and_in_the_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(tmp_path, monkeypatch, [])
    assert built.name == "fastcnn-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(built) as archive:
        tags = archive.read("fastcnn-0.1.0.dist-info/WHEEL")
        assert tags == b"Tag: cp311-cp311-manylinux_2_28_x86_64\n"
        rows = csv.reader(archive.read("fastcnn-0.1.0.dist-info/RECORD").decode().splitlines())
        records = {name: (digest, size) for name, digest, size in rows}
        assert archive.read("fastcnn/_ops.so") == b"library"
    digest, size = records["fastcnn-0.1.0.dist-info/WHEEL"]
    expected = hashlib.sha256(tags).digest()
    assert base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=") == expected
    assert int(size) == len(tags)
    assert records["fastcnn/_ops.so"] == ("sha256=x", "7")


def test_a_wheel_that_needs_more_does_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build(tmp_path, monkeypatch, ["exp of GLIBC_2.29 in _ops.so"])
    assert built.name == NAME
    assert "not manylinux_2_28, for exp of GLIBC_2.29 in _ops.so" in capsys.readouterr().out
    with zipfile.ZipFile(built) as archive:
        tags = archive.read("fastcnn-0.1.0.dist-info/WHEEL")
    assert tags == b"Tag: cp311-cp311-linux_x86_64\n"


@pytest.mark.parametrize(("target", "werror"), [("wheel", ""), ("gpu", ""), ("lint", "ON")])
def test_make_takes_warnings_for_errors_in_development_alone(target: str, werror: str) -> None:
    # What a recipe would see, told by one in front of it, which is the only one that runs.
    tell = f"\ntell:\n\t@echo werror=$$FASTCNN_WERROR.; exit 1\n{target}: tell\n"
    made = subprocess.run(
        ["make", "-f", "-", target],
        input=(ROOT / "Makefile").read_text() + tell,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
    )
    assert f"werror={werror}." in made.stdout, made.stderr

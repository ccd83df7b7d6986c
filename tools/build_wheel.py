"""Build a wheel, with the name of the oldest systems that its libraries run on.

    python tools/build_wheel.py dist

torch's own wheels say manylinux_2_28: glibc 2.28 and the libstdc++ of GCC 8. So does this one where
no symbol of its libraries is newer; else it stays linux, and the first such symbol is named.
"""

import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
POLICY = "manylinux_2_28"
# What the policy has: https://github.com/pypa/auditwheel, manylinux-policy.json, for x86-64.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
    "libtorch_cpu.so",  # of the torch that is in the process
}


def main(folder: str) -> None:
    """Build into a folder."""
    print("wheel: building", flush=True)
    with tempfile.TemporaryDirectory() as built:
        if subprocess.run([*PIP, "--wheel-dir", built, str(ROOT)]).returncode != 0:
            sys.exit("wheel: pip wheel failed: its output is above")
        (wheel,) = Path(built).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            libraries = [name for name in archive.namelist() if name.endswith(".so")]
            unpacked = [Path(archive.extract(name, built)) for name in libraries]
        newer = [found for library in unpacked for found in beyond_policy(library)]
        if newer:
            print(f"wheel: not {POLICY}, for {newer[0]}")
        made = copy(wheel, Path(folder), "linux" if newer else POLICY)
    print(f"wheel: {made}")


def beyond_policy(library: Path) -> list[str]:
    """What a library needs beyond the policy, by name."""
    command = ["objdump", "-p", "-T", str(library)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"^ +NEEDED +(\S+)$", told, re.MULTILINE)) - LIBRARIES
    found = [f"{library.name} needs {name}" for name in sorted(needed)]
    # `0x0d696914 0x00 06 GLIBC_2.4` under Version References.
    for version in sorted(set(re.findall(r"^ +0x\w+ 0x\w+ \d+ (\S+)$", told, re.MULTILINE))):
        name, _, number = version.partition("_")
        if not re.fullmatch(r"[\d.]+", number) or numbers(number) > NEWEST.get(name, ()):
            # `0000 DF *UND* 0000 (GLIBC_2.4) name`; without a symbol it is the linker that asks.
            symbols = re.findall(rf"\*UND\*.*\b{re.escape(version)}\)? +(\S+)$", told, re.MULTILINE)
            found += [f"{symbol} of {version} in {library.name}" for symbol in symbols or ["all"]]
    return found


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(int(number) for number in version.split("."))


def copy(wheel: Path, folder: Path, platform: str) -> Path:
    """Copy a wheel for linux into a folder, as one for another platform of the same processor."""
    machine = re.search(r"-linux_(\w+)\.whl$", wheel.name)
    if machine is None:
        sys.exit(f"wheel: expected a wheel for linux, got {wheel.name}")
    old, new = f"-linux_{machine[1]}", f"-{platform}_{machine[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / wheel.name.replace(old, new)
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        (tags,) = [n for n in source.namelist() if re.fullmatch(r"[^/]+\.dist-info/WHEEL", n)]
        text = re.sub(rf"(?m){old}$", new, source.read(tags).decode()).encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).decode().rstrip("=")
        for item in source.infolist():
            content = source.read(item)
            if item.filename == tags:
                content = text
            elif item.filename == tags.replace("WHEEL", "RECORD"):
                line = f"{tags},sha256={digest},{len(text)}"
                record = content.decode()
                content = re.sub(rf"(?m)^{re.escape(tags)},.*$", line, record).encode()
            target.writestr(item, content)
    return made


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"wheel: expected the folder to build into, got {sys.argv[1:]}")
    main(sys.argv[1])

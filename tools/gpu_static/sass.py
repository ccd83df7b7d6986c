"""The machine code of a library's CUDA kernels, as ptxas made it: SASS, by NVIDIA's disassembler.

The tools come with Triton, so that no CUDA toolkit is needed where a library is already built.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton

ARCH = 90  # whose figures are asked
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([\w.]+)\s*(.*)$")
LABEL = re.compile(r"^(\.L_\w+):")
USED = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Instruction:
    """One instruction of a warp."""

    opcode: str  # with its qualifiers: LDG.E.128
    operands: str
    conditional: bool  # whether a predicate guards it
    targets: list[str]  # the labels that it may jump to
    labels: list[str]  # that stand before it
    counted: bool = True  # as an access to what a kernel is for

    @property
    def name(self) -> str:
        """Its opcode without qualifiers."""
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """The bytes that a thread moves, where it is an access to memory."""
        return next((BYTES[word] for word in self.opcode.split(".") if word in BYTES), 4)

    @property
    def ends(self) -> bool:
        """Whether what follows is reached by a jump alone."""
        # BRA has a second condition at times: `@!P0 BRA !P1, target`.
        plain = self.name == "BRX" or (self.name == "BRA" and "P" not in self.operands)
        return not self.conditional and (plain or self.name in ("EXIT", "RET"))


@dataclass
class Function:
    """One kernel, or one instantiation of a template."""

    name: str  # demangled, without its parameters
    registers: int
    spilled: int  # bytes of a thread's local memory
    threads: int  # the most that a block may have
    code: list[Instruction] = field(repr=False)

    @property
    def kernel(self) -> str:
        """Its name without the template's arguments."""
        return self.name.split("<")[0]

    @property
    def arguments(self) -> str:
        """Those arguments."""
        return self.name[len(self.kernel) :].strip("<>")


def functions(library: Path) -> list[Function]:
    """Disassemble all kernels of a library, or of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = [library]
        if library.suffix != ".cubin":
            _run("cuobjdump", "-xelf", "all", library.resolve(), cwd=folder)
            cubins = sorted(Path(folder).glob(f"*sm_{ARCH}.cubin"))
            if not cubins:
                raise ValueError(f"{library}: expected code for sm_{ARCH}, got none")
        with ThreadPoolExecutor() as pool:
            return [function for found in pool.map(_of_cubin, cubins) for function in found]


def _of_cubin(cubin: Path) -> list[Function]:
    usage = USED.findall(_run("cuobjdump", "--dump-resource-usage", cubin))
    used = {name: list(map(int, numbers)) for name, *numbers in usage}
    bounds = _bounds(_run("cuobjdump", "-elf", cubin))
    bodies = dict(_bodies(_run("nvdisasm", "-c", cubin)))
    assert set(used) == set(bodies), "kernels without code, or code without resources"
    found = []
    for (mangled, code), name in zip(bodies.items(), _plain_names(list(bodies)), strict=True):
        registers, stack, _, local = used[mangled]
        threads = bounds.get(mangled, 1024)
        found.append(Function(name, registers, stack + local, threads, code))
    return found


def _plain_names(mangled: list[str]) -> list[str]:
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    plain = re.sub(r"^void |fastcnn::|\(anonymous namespace\)::", "", names, flags=re.MULTILINE)
    return [name.split("(")[0] for name in plain.splitlines()]


def _bounds(elf: str) -> dict[str, int]:
    """The most threads of a block, of kernels that state it."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        name = part.split()[0]
        if threads := re.search(r"MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\w+) (\w+) (\w+)", part):
            x, y, z = (int(word, 16) for word in threads.groups())
            found[name] = x * y * z
    return found


def _bodies(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each function's instructions, those behind its last EXIT that only pad it left out."""
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, lines = part.split(":", 1)
        code: list[Instruction] = []
        labels: list[str] = []
        for line in lines.splitlines():
            if label := LABEL.match(line):
                labels.append(label[1])
            elif match := LINE.match(line):
                _, predicate, opcode, operands = match.groups()
                # What CALL calls comes back: it is no jump. BRX has its targets in a remark.
                jumps = opcode.split(".")[0] in ("BRA", "BRX")
                targets = re.findall(r"\.L_\w+", operands) if jumps else []
                operands = operands.split(";")[0].split("(*")[0]
                code.append(Instruction(opcode, operands, predicate is not None, targets, labels))
                labels = []
        yield name, code


def _run(tool: str, *arguments: str | Path, cwd: str | None = None) -> str:
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout

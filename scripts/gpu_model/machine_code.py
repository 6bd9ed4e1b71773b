"""From a file of csrc/cuda to the instructions of its kernels: compile, read the ELF file, disassemble."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from capture import FOLDER, demangle, plain_name
from native import ROOT, CannotBuild, Nvcc, Unit, cuda_architectures

RESERVED = 1024  # bytes at the beginning of a block's shared memory that are the system's, since sm_90
PARAMETERS, FRAME, REGISTERS = 0x0A, 0x11, 0x2F  # records of .nv.info


def find_tool(name: str) -> str:
    """On the path, in the CUDA toolkit, or in Triton's package. Raises CannotBuild where there is none."""
    folders = [Path(os.environ[home]) / "bin" for home in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(home)]
    folders.append(Path("/usr/local/cuda/bin"))
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "backends/nvidia/bin")
    found = [shutil.which(name), *(str(f / name) for f in folders if (f / name).is_file())]
    tool = next(filter(None, found), None)
    if tool is None:
        raise CannotBuild(f"no {name} was found, which comes with CUDA's toolkit and with Triton")
    return tool


def call(tool: str, *arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([find_tool(tool), *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise CannotBuild(f"{tool} failed: {(done.stderr.splitlines() or ['it says nothing'])[-1]}")
    return done.stdout


def compiled(source: str, architecture: str) -> Path:
    """Machine code that knows its lines; but for that it is what a build has."""
    flags = ["-lineinfo", "-cubin", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    unit = Unit(source, Path(source).stem, flags)
    return Nvcc([architecture]).compile([unit], FOLDER / f"sm_{architecture}")[0]


def built(unit: str, architecture: str) -> Path:
    """Of the objects of a build for the GPUs that scripts/cuda_report.py compiles for."""
    nvcc = Nvcc(cuda_architectures())
    units = [u for u in nvcc.kernel_units() if u.name == f"cuda_{unit}"]
    (made,) = nvcc.compile(units, ROOT / "build" / "objects")
    found = re.search(rf"\S+\.sm_{architecture}\.cubin", call("cuobjdump", "-lelf", str(made)))
    if found is None:
        raise CannotBuild(f"{made.name} is not compiled for sm_{architecture} (MANN_FAST_CUDA_ARCHS)")
    target = FOLDER / "built" / unit
    target.mkdir(parents=True, exist_ok=True)
    call("cuobjdump", "-xelf", found[0], str(made), cwd=target)
    return target / found[0]


@dataclass
class Instruction:
    address: int
    text: str  # as disassembled
    guard: str  # "", "P0", "!P0", "UP1"
    name: str  # with modifiers: "ISETP.GE.AND"
    operands: list[str]
    target: int | None = None  # of a branch
    # What the compiler wrote into it: cycles until the warp's next, the scoreboards that are set until its result is there and
    # until its registers have been read (7: none), and those that it waits for, a bit each.
    stall: int = 0
    sets: int = 7
    reads: int = 7
    waits: int = 0
    lines: list[tuple[str, int]] = field(default_factory=list)  # of the source, innermost first

    @cached_property
    def base(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]


@dataclass
class Kernel:
    name: str
    instructions: dict[int, Instruction]
    registers: int
    stack: int
    static_shared: int  # bytes, beside those that a launch asks for
    parameters_at: int  # in constant bank 0
    constants: dict[int, bytes]  # the other banks


class Elf:
    def __init__(self, data: bytes) -> None:
        (start,) = struct.unpack_from("<Q", data, 0x28)
        _, count, names = struct.unpack_from("<HHH", data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, start + 64 * i) for i in range(count)]

        def text(table: int, at: int) -> str:
            begin = headers[table][4] + at
            return data[begin : data.index(b"\0", begin)].decode()

        # Sections by name; of one without content (NOBITS) the size alone counts.
        self.sections: dict[str, bytes] = {}
        for _, h in enumerate(headers):
            self.sections[text(names, h[0])] = bytes(h[5]) if h[1] == 8 else data[h[4] : h[4] + h[5]]
        table = next(h for h in headers if h[1] == 2)
        ats = range(table[4], table[4] + table[5], 24)
        self.symbols = [text(table[6], struct.unpack_from("<I", data, at)[0]) for at in ats]

    def records(self, section: str) -> list[tuple[int, bytes]]:
        """Of a section .nv.info: what each is of, and what it says."""
        data, at, found = self.sections.get(section, b""), 0, []
        while at + 4 <= len(data):
            form, kind, size = struct.unpack_from("<BBH", data, at)
            size = size if form == 4 else 0
            found.append((kind, data[at + 4 : at + 4 + size]))
            at += 4 + size
        return found


class Code:
    """The machine code of one file, with all its kernels."""

    def __init__(self, file: Path) -> None:
        self.file, self.elf = file, Elf(file.read_bytes())
        mangled = [s.removeprefix(".text.") for s in self.elf.sections if s.startswith(".text.")]
        self.names = {plain_name(d): m for d, m in zip(demangle(mangled), mangled, strict=True)}
        self._kernels: dict[str, Kernel] = {}

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = self._read(name)
        return self._kernels[name]

    def _read(self, name: str) -> Kernel:
        if name not in self.names:
            raise CannotBuild(f"{self.file} has no kernel {name}, only {', '.join(sorted(self.names))}")
        symbol, elf = self.names[name], self.elf
        index = elf.symbols.index(symbol)
        of_symbol = {
            kind: struct.unpack_from("<II", value)[1]
            for kind, value in elf.records(".nv.info")
            if len(value) == 8 and struct.unpack_from("<I", value)[0] == index
        }
        at = next(
            struct.unpack_from("<IHH", value)[1]
            for kind, value in elf.records(f".nv.info.{symbol}")
            if kind == PARAMETERS
        )
        banks = {}
        for section, content in elf.sections.items():
            if match := re.fullmatch(rf"\.nv\.constant([1-9]\d*)(\.{re.escape(symbol)})?", section):
                banks[int(match[1])] = content
        listing = call("nvdisasm", "-c", "-hex", "-gi", "-ndf", "-fun", str(index), str(self.file))
        shared = len(elf.sections.get(f".nv.shared.{symbol}", b""))
        return Kernel(
            name,
            parse(listing),
            of_symbol.get(REGISTERS, 0),
            of_symbol.get(FRAME, 0),
            max(0, shared - RESERVED),
            at,
            banks,
        )


LABEL = re.compile(r"^([.\w$]+):\s*$")
LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)( inlined at)?')
CODE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/")
UPPER = re.compile(r"^\s+/\* (0x[0-9a-f]+) \*/")


def parse(listing: str) -> dict[int, Instruction]:
    """Instructions by address, from what nvdisasm -hex prints; the upper half of an encoding holds the control bits."""
    found: dict[int, Instruction] = {}
    labels: dict[str, int] = {}
    names: list[str] = []  # labels of the next instruction
    lines: list[tuple[str, int]] = []
    complete = True  # whether the lines have come to the outermost
    for row in listing.splitlines():
        if match := LINE.match(row):
            lines = [*([] if complete else lines), (match[1], int(match[2]))]
            complete = match[3] is None
        elif match := LABEL.match(row):
            names.append(match[1])
        elif match := CODE.match(row):
            address = int(match[1], 16)
            labels |= dict.fromkeys(names, address)
            names = []
            last = found[address] = instruction(address, match[2] or "", match[3], lines)
        elif (match := UPPER.match(row)) and found:
            bits = int(match[1], 16) >> 41
            last.stall, last.sets, last.reads, last.waits = (
                bits & 15,
                bits >> 5 & 7,
                bits >> 8 & 7,
                bits >> 11 & 63,
            )
    for ins in found.values():
        if goes := re.search(r"`\(([^)]+)\)", ins.text):
            ins.target = labels.get(goes[1])
    return found


def instruction(address: int, guard: str, text: str, lines: list[tuple[str, int]]) -> Instruction:
    name, _, rest = re.sub(r"\(\*.*?\*\)", "", text).strip().partition(" ")
    operands = re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|[^,\[(])+", rest.replace(".reuse", ""))
    return Instruction(address, text, guard, name, [x.strip() for x in operands if x.strip()], lines=lines)

"""Compile every Triton kernel ahead of time for the GPUs of three generations, none of which is needed.

Prints a Markdown table of registers, spills and shared memory, and fails where a kernel needs more shared memory than a
chip has, spills at the paper's sizes, or has got a matrix product, which is in TF32. The launchers themselves say what to
compile: they run on tensors of device "meta", with the launch replaced by taking notes.

python scripts/triton_aot.py [--reduced] [--write docs/triton.md]
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mann_fast import kernels
from mann_fast._anchors import lrua_interval, ntm_interval
from mann_fast.kernels import content, dnc, lrua, lrua_scan, ntm, sparse, sparse_backward
from mann_fast.kernels._sizes import fits_one_program

# Bytes that a launch is known to spill, by its name, keys and compute capability; any other may spill none. ntm_scan: a number
# that is needed once a step, that of the steps. dnc_scan_backward: a memory and its gradient are held beside the blocks of
# links and, where keys have masks, beside the masked terms of a head. sparse_read and sparse_scan_backward: one number, with
# more than 150 registers to spare.
REPAIRED_BACKWARD = "dnc_scan_backward, links, masks, sharpening, deallocate"
KNOWN_SPILLS = {
    ("ntm_scan, read_first, resets and lengths", "fp32", 80): 8,
    ("dnc_scan_backward, links", "fp32", 80): 8,
    ("dnc_scan_backward, links", "bf16", 80): 8,
    ("dnc_scan_backward, links, resets and lengths", "fp32", 80): 32,
    ("dnc_scan_backward, links, resets and lengths", "bf16", 80): 16,
    (REPAIRED_BACKWARD, "fp32", 80): 344,
    (REPAIRED_BACKWARD, "fp32", 90): 120,
    (REPAIRED_BACKWARD, "fp32", 100): 64,
    (REPAIRED_BACKWARD, "bf16", 80): 280,
    (REPAIRED_BACKWARD, "bf16", 90): 40,
    (REPAIRED_BACKWARD, "bf16", 100): 16,
    ("sparse_read, step", "fp32", 80): 8,
    ("sparse_read, step", "bf16", 80): 8,
    ("sparse_read, step, resets and lengths", "fp32", 80): 8,
    ("sparse_read, step, resets and lengths", "bf16", 80): 8,
    ("sparse_scan_backward, resets and lengths", "bf16", 100): 8,
}
SHARED_KIB = {80: 163, 90: 227, 100: 227}  # of one block, by compute capability
PAPER = (128, 40, 4)
MANY_HEADS = (64, 24, 9)  # padded to 16, of which Triton may make matrix products
SHAPES = [PAPER, (64, 32, 1), (256, 64, 4), (4096, 64, 4), MANY_HEADS]  # N, D, R
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


class Launch:
    """One launch that a launcher asked for: all that decides what is compiled."""

    def __init__(self, kernel, arguments, options, num_warps, constants):
        self.kernel, self.options, self.num_warps = kernel, options, num_warps
        names = list(inspect.signature(kernel.fn).parameters)
        runtime = [name for name in names if name not in constants]
        self.constants = dict(constants)
        self.types, self.divisible = {}, []
        for name, value in zip(runtime, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                self.types[name] = "*" + TYPES[value.dtype]
                self.divisible.append(names.index(name))
            elif isinstance(value, int):
                self.types[name] = "i32"
                if value % 16 == 0 and name not in kernel.do_not_specialize:
                    self.divisible.append(names.index(name))
            else:
                self.constants[name] = value  # None stands for an absent tensor
        self.signature = {name: self.types.get(name, "constexpr") for name in names}

    @property
    def name(self) -> str:
        name = self.kernel.fn.__name__.strip("_").removesuffix("_kernel")
        options = {
            "READ_FIRST": ", read_first",
            "LINKS": ", links",
            "MASKED": ", masks",
            "SHARPENED": ", sharpening",
        }
        options |= {"DEALLOCATE": ", deallocate", "STEP": ", step", "LENGTHS": ", resets and lengths"}
        return name + "".join(words for option, words in options.items() if self.constants.get(option))

    @property
    def key(self):
        return self.name, self.num_warps, str(self.signature), str(self.constants)

    def compile(self, capability: int):
        source = ASTSource(
            self.kernel,
            self.signature,
            {(list(self.signature).index(name),): value for name, value in self.constants.items()},
            {(place,): [["tt.divisibility", 16]] for place in self.divisible},
        )
        return triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": self.num_warps, **self.options},
        )


def launches(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Launch]:
    """Every kernel that the ops launch at this shape, forward and backward."""
    slots, size, heads = shape
    found: dict = {}

    def note(kernel, grid, *arguments, options, num_warps=4, **constants):
        launch = Launch(kernel, arguments, options, num_warps, constants)
        found.setdefault(launch.key, launch)

    def empty(*sizes, dtype=torch.float64 if dtype == torch.float64 else torch.float32):
        return torch.empty(sizes, device="meta", dtype=dtype)

    for family in kernels.FAMILIES:
        family.launch = note
    memory, weights, usage = empty(2, slots, size), empty(2, heads, slots), empty(2, slots)
    key, gate = empty(2, heads, size, dtype=dtype), empty(2, heads, dtype=dtype)
    read, out = content.content_read(memory, key, gate, 1e-6)
    content.content_read_backward(read, out, memory, key, gate, out, 1e-6)
    new, write_weights, chosen = lrua.lrua_write(memory, weights, usage, key, gate, False)
    lrua.lrua_write_backward(new, write_weights, weights, key, gate, chosen, False)
    whole = (None, None, None)
    cut = (empty(20, 2, dtype=torch.bool), empty(2, dtype=torch.int64), empty(slots, size))
    for sequences in (whole, cut) if shape == PAPER else [whole]:
        sparse_launches(empty, dtype, slots, size, heads, sequences)
    if fits_one_program(slots, size):
        variants = list(itertools.product((False, True), (whole, cut)))
        keys, gates = key.expand(20, -1, -1, -1), gate.expand(20, -1, -1)
        inputs, every = (keys, keys, gates, gates), lrua_interval(slots, size, heads)
        for read_first, sequences in variants if shape == PAPER else [(False, whole)]:
            options = (read_first, False)
            reads, memory, weights, _, *kept = lrua_scan.lrua_scan(
                memory, weights, usage, *inputs, *sequences, *options, 0.95, 1e-6, every
            )
            lrua_scan.lrua_scan_backward(
                reads, memory, weights, memory, weights, *inputs, *sequences, *kept, *options, 1e-6, every
            )
        writes, moves = 1, 3
        of_heads, shares = (20, 2, heads + writes), empty(20, 2, heads + writes, dtype=dtype)
        inputs = (
            empty(*of_heads, size, dtype=dtype), shares, shares, empty(*of_heads, moves, dtype=dtype), shares,
            *[empty(20, 2, writes, size, dtype=dtype)] * 2,
        )  # fmt: skip
        weights = empty(2, heads + writes, slots)
        every = ntm_interval(slots, size, heads + writes)
        for read_first, sequences in variants if shape == PAPER else [(True, whole)]:
            options = (read_first, 1e-6, every)
            reads, memory, weights, *kept = ntm.ntm_scan(memory, weights, *inputs, *sequences, *options)
            ntm.ntm_scan_backward(
                reads, memory, weights, memory, weights, *inputs, *sequences, *kept, *options
            )
        dnc_launches(empty, dtype, slots, size, heads, whole, *GRAVES)
        if shape == PAPER:
            dnc_launches(empty, dtype, slots, size, heads, cut, *GRAVES)
            dnc_launches(empty, dtype, slots, size, heads, whole, *CSORDAS)
            dnc_launches(empty, dtype, slots, size, heads, whole, *WITHOUT_LINKS)
    return list(found.values())


# Links, masks and sharpening, deallocate: the DNC of Graves et al. 2016, with all that Csordas and Schmidhuber 2019 add, and
# without links.
GRAVES, CSORDAS, WITHOUT_LINKS = (True, False, False), (True, True, True), (False, False, False)


def dnc_launches(empty, dtype, slots, size, heads, sequences, links, repaired, deallocate):
    """Forward and backward of dnc_scan."""

    def told(*tail, there=True):
        return empty(20, 2, *tail, dtype=dtype) if there else None

    weights, rows = empty(2, heads, slots), empty(2, slots)
    state = [
        empty(2, slots, size),
        rows,
        rows if links else None,
        empty(2, slots, slots) if links else None,
        weights,
        rows,
    ]
    interface = [
        told(heads, size),
        told(heads),
        told(size),
        told(),
        told(size),
        told(size),
        told(heads),
        told(),
        told(),
    ]
    interface += [told(heads, 3, there=links), told(heads, size, there=repaired), told(size, there=repaired)]
    interface += [told(heads, 2, there=links and repaired)]
    outputs = dnc.dnc_scan(*state, *interface, *sequences, deallocate, 1e-6, 1)
    given = [None if x is None else y for x, y in zip([weights, *state], outputs[:7], strict=True)]
    dnc.dnc_scan_backward(*given, *state, *interface, *sequences, *outputs[7:], deallocate, 1e-6, 1)


def sparse_launches(empty, dtype, slots, size, heads, sequences):
    """Forward and backward of sparse_scan, and where sequences are whole of sparse_read."""
    memory, reads = empty(2, slots, size), 4
    integers = [empty(2, *sizes, dtype=torch.int64) for sizes in ((heads, reads), (slots,), ())]
    keys, gates = empty(20, 2, heads, size, dtype=dtype), empty(20, 2, heads, dtype=dtype)
    told = keys, keys, gates, gates, gates, *sequences
    state = memory, integers[0], empty(2, heads, reads), *integers[1:]
    out, memory, _, weights, _, _, *kept = sparse.sparse_scan(*state, *told, slots, 0.005, 1e-6, 1)
    sparse_backward.sparse_scan_backward(out, memory, weights, *state[1:3], *told, *kept, slots, 1e-6, 1)
    if not any(x is not None for x in sequences):
        read, chosen, weights, rows = sparse.sparse_read(memory, keys[0], gates[0], slots, reads, 1e-6)
        kept = keys[0], gates[0], weights, chosen, rows
        sparse_backward.sparse_read_backward(read, weights, *kept, slots, reads, 1e-6)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of a cubin, by the tool in Triton's wheel."""
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        answer = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", answer.stdout)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="put the table into this file, between its two marks")
    parser.add_argument(
        "--reduced", action="store_true", help="the paper's sizes and many heads for one generation (sm_90)"
    )
    args = parser.parse_args()
    capabilities = [90] if args.reduced else list(SHARED_KIB)
    columns = [f"sm_{capability} registers / spilled bytes / shared KiB" for capability in capabilities]
    lines = [
        f"| N, D, R | keys | kernel | warps | {' | '.join(columns)} |",
        "| --- " * (4 + len(columns)) + "|",
    ]
    problems = []
    for shape in [PAPER, MANY_HEADS] if args.reduced else SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            if dtype != torch.float32 and shape != PAPER:
                continue
            for launch in launches(shape, dtype):
                cells = []
                for capability in capabilities:
                    limit = SHARED_KIB[capability]
                    compiled = launch.compile(capability)
                    used = resources(compiled.asm["cubin"])
                    spilled, shared = used["STACK"] + used["LOCAL"], compiled.metadata.shared / 1024
                    cells.append(f"{used['REG']} / {spilled} / {shared:.1f}")
                    where = f"{launch.name} at {shape}, {TYPES[dtype]} keys, sm_{capability}"
                    if "tt.dot" in compiled.asm["ttir"]:
                        problems.append(
                            f"{where}: a sum has become a matrix product, in TF32 (_memory.sum_slots)"
                        )
                    if shared > limit:
                        problems.append(f"{where}: {shared:.0f} KiB of shared memory, the chip has {limit}")
                    known = KNOWN_SPILLS.get((launch.name, TYPES[dtype], capability), 0)
                    if spilled > known and shape == PAPER and dtype != torch.float64:  # which is for tests
                        problems.append(f"{where}: {spilled} bytes spilled")
                sizes = ", ".join(map(str, shape))
                lines.append(
                    f"| {sizes} | {TYPES[dtype]} | {launch.name} | {launch.num_warps} | {' | '.join(cells)} |"
                )
                print(lines[-1], flush=True)
    if args.write:
        text = args.write.read_text()
        before, rest = text.split(BEGIN)
        table = "\n".join([BEGIN, f"Triton {triton.__version__}.", "", *lines, END])
        args.write.write_text(before + table + rest.split(END)[1])
    print(
        "\n".join(problems)
        or f"Triton {triton.__version__}: no spills at the paper's sizes but those known, shared memory within limits"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

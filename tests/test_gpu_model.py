"""The model of the CUDA kernels' machine code (scripts/gpu_model): what instructions mean, and what they take."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "scripts").is_dir(), reason="needs the source tree")
THREADS = 64


@pytest.fixture
def model(monkeypatch):
    """The folder's modules are found; each test imports those that it needs."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.syspath_prepend(ROOT / "scripts" / "gpu_model")


@pytest.fixture
def tools(model):
    """Skips where a program is missing that makes machine code or shows it."""
    from machine_code import find_tool
    from native import CannotBuild, Nvcc

    try:
        Nvcc(["90"]), find_tool("nvdisasm")
    except CannotBuild as problem:
        pytest.skip(str(problem))


def interpreted(name, inputs, dtype, count):
    """What a kernel of instructions.cu writes, results by threads."""
    from capture import Launch
    from machine import Machine
    from machine_code import Code, compiled

    results = np.zeros((count, THREADS), dtype)
    pointers = struct.pack(f"{len(inputs) + 1}Q", *(x.ctypes.data for x in (*inputs, results)))
    kernel = Code(compiled("tests/instructions.cu", "90")).kernel(name)
    Machine(kernel, Launch(name, "", 1, THREADS, 1, 0, pointers), 1).run(0)
    return results


def assert_rows(found, expected, **tolerance):
    assert len(found) == len(expected)
    for i, (row, right) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(row, right, err_msg=f"result {i}", **tolerance)


def bits(x, size):
    """Whole numbers as those of so many bits with a sign."""
    return np.array([(int(v) + 2 ** (size - 1)) % 2**size - 2 ** (size - 1) for v in x], object)


def test_integers_are_numpys(tools):
    rng = np.random.default_rng(0)
    a = rng.integers(-(2**31), 2**31, THREADS).astype(np.int32)
    b = (rng.integers(1, 2**31, THREADS) >> rng.integers(0, 31, THREADS)).astype(np.int32) + 1
    b[::3] *= -1
    a[5] = b[5]
    x, y, ua, ub = (
        a.astype(object),
        b.astype(object),
        a.view(np.uint32).astype(object),
        b.view(np.uint32).astype(object),
    )

    def quotient(p, q):
        return np.array(
            [abs(i) // abs(j) * (1 if (i < 0) == (j < 0) else -1) for i, j in zip(p, q, strict=True)], object
        )

    by = y & 31
    both = ua + ub * 2**32
    permuted = sum(((both >> 8 * k) & 255) << 8 * i for i, k in enumerate((1, 4, 5, 2)))
    expected = [
        bits(x + y, 32), bits(x - y, 32), bits(x * y, 32), x * y, bits(quotient(x, y), 32), x - quotient(x, y) * y, ua // ub,
        quotient(x * 1000003, y), bits(x << by, 32), x >> by, ua >> by, bits(x << by, 64), x * x >> by,
        np.minimum(x, y), np.maximum(x, y), x & y | ~x, x ^ y, np.where(x == y, x, y * 5), bits(abs(x), 32),
        [v.bit_count() for v in ua], [32 - v.bit_length() for v in ua], permuted,
        ((ub << 32 | ua) << by >> 32) % 2**32, x < y, ua < ub, x * y < y * y, x - 3 * y, bits(x, 8), ua * 7 + ub,
    ]  # fmt: skip
    found = interpreted("integers", (a, b), np.int64, len(expected))
    for i, (row, right) in enumerate(zip(found, expected, strict=True)):
        assert row.tolist() == [int(v) for v in right], f"result {i}"


def test_floats_are_numpys(tools):
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=THREADS).astype(np.float32) * 10 for _ in range(2))
    x, y = a.astype(np.float64), b.astype(np.float64)
    bfloat16 = (a.view(np.uint32) + 0x7FFF + (a.view(np.uint32) >> 16 & 1) & 0xFFFF0000).view(np.float32)
    expected = [
        x + y, x - y, x * y, x * y + x, x / y, np.sqrt(abs(x)), 1 / np.sqrt(abs(x)), np.exp(x), np.log(abs(x)), np.tanh(x),
        np.floor(x), np.rint(x), np.trunc(x), np.ceil(x), np.minimum(x, y), np.maximum(x, y), x < y, np.trunc(x), x / y,
        a.astype(np.float16), bfloat16, np.exp2(x),
    ]  # fmt: skip
    assert_rows(interpreted("floats", (a, b), np.float32, len(expected)), expected, rtol=2e-6, atol=1e-6)


def test_doubles_are_numpys(tools):
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=THREADS) * 10 for _ in range(2))
    expected = [
        x + y, x - y, x * y, x * y + x, x / y, np.sqrt(abs(x)), 1 / np.sqrt(abs(x)), np.exp(x), np.log(abs(x)),
        x.astype(np.float32), np.trunc(x), np.floor(x), x < y, abs(y), np.trunc(x),
    ]  # fmt: skip
    assert_rows(interpreted("doubles", (x, y), np.float64, len(expected)), expected, rtol=1e-14, atol=1e-15)


def test_lanes_that_part_and_meet(tools):
    rng = np.random.default_rng(3)
    a = rng.integers(-100, 100, THREADS).astype(np.int32)
    t = np.arange(THREADS)
    lane, warp = t % 32, t // 32 * 32
    warps = a.reshape(-1, 32)
    ballot = np.packbits(warps > 0, axis=1, bitorder="little").view(np.int32)
    rows = a.reshape(16, 4)[t % 16]

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    def apart(i):
        if i % 3 == 0:
            return sum(int(a[i]) if k % 2 else -1 for k in range(i % 7))
        return int(a[i : i + 1].view(np.uint32)[0]).bit_count() if i % 3 == 1 else 0

    inverse = [{(i * 3 + k) % 8: i for i in range(8)} for k in range(THREADS)]
    expected = [
        a[warp + (lane ^ 5)], a[warp + (a & 31)], a[warp + np.where(lane >= 3, lane - 3, lane)],
        a[warp + np.where(lane < 28, lane + 4, lane)], np.repeat(ballot, 32), np.repeat((warps == 7).any(1), 32),
        np.repeat(warps.view(np.uint32).min(1), 32).view(np.int32), np.repeat(warps.sum(1), 32),
        a[::-1], rows @ [1, 2, 3, 4], a.view(np.uint8)[t], [steps(i + 1) for i in t], [apart(i) for i in t],
        [inverse[i][a[i] & 7] * a[i] for i in t],
    ]  # fmt: skip
    found = interpreted("lanes", (a,), np.int32, len(expected))
    for i, (row, right) in enumerate(zip(found, expected, strict=True)):
        assert row.tolist() == [int(v) for v in right], f"result {i}"


# ---- cycles -----------------------------------------------------------------------------------------------------------


def by_hand(program):
    """A kernel of instructions with what the compiler would have written into them: stall, sets, waits."""
    from machine_code import Kernel, parse

    rows = []
    for i, (text, stall, sets, waits) in enumerate(program):
        control = stall | sets << 5 | 7 << 8 | sum(1 << w for w in waits) << 11
        rows += [
            f"        /*{16 * i:04x}*/  {text} ;  /* 0x0 */",
            f"                      /* 0x{control << 41:016x} */",
        ]
    return Kernel("by hand", parse("\n".join(rows)), 16, 0, 0, 0x210, {})


def timed(program, threads=32, blocks=1):
    from capture import Launch
    from clock import LATENCIES, Clock
    from machine import Machine

    launch = Launch("by hand", "", blocks, threads, 1, 8192, b"")
    machine = Machine(by_hand(program), launch, blocks)
    traces = machine.run(0)
    warps = threads // 32
    split = [traces[b * warps : (b + 1) * warps] for b in range(blocks)]
    return Clock(machine.kernel, launch, machine.steps, split, LATENCIES).run(), LATENCIES


def through_shared(stride):
    return [
        ("S2R R0, SR_TID.X", 1, 0, ()),
        ("MOV R2, 0x400", 4, 7, ()),
        (f"IMAD R3, R0, {stride}, R2", 4, 7, (0,)),
        ("STS [R3], R0", 1, 7, ()),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", 5, 7, ()),
        ("LDS R4, [R3]", 1, 1, ()),
        ("IADD3 R4, R4, R4, RZ", 2, 7, (1,)),
        ("EXIT", 1, 7, ()),
    ]


def test_cycles_are_those_counted_by_hand(model):
    record, latency = timed(through_shared("0x4"))
    address = latency["special register"]  # IMAD waits for S2R, then four cycles to STS, one to the barrier
    loads = address + 4 + 1 + latency["barrier"]
    assert record.cycles == loads + latency["shared load"] + 2
    assert sum(record.count.values()) == 8 and not +record.conflicts
    assert record.why["barrier"] == latency["barrier"]
    assert sum(record.spent.values()) == record.cycles == sum(record.why.values())


def test_bank_conflicts_take_a_wavefront_each(model):
    plain, _ = timed(through_shared("0x4"))
    apart, latency = timed(through_shared("0x80"))  # all lanes in one bank
    # The load begins when the store has kept the memory pipe for 32 cycles, unless the barrier took longer.
    assert latency["barrier"] + 1 < 32 < apart.cycles - plain.cycles < 64
    assert (
        sorted(apart.conflicts.elements()).count(0x30) == apart.conflicts[0x30] == apart.conflicts[0x50] == 31
    )


def test_warps_share_schedulers(model):
    loop = [("MOV R0, 0x1", 1, 7, ())] * 50 + [("EXIT", 1, 7, ())]
    alone, four, five = (timed(loop, threads=32 * n)[0].cycles for n in (1, 4, 5))
    assert alone == four == 99  # an operation of integers every second cycle, and then the end
    assert five == 199
    assert timed(loop, threads=96, blocks=2)[0].cycles == 199


def test_what_is_not_known_is_named(model):
    from operands import Unsupported

    with pytest.raises(Unsupported, match="cannot go through 'TEX R0, R1' at 0x10"):
        timed([("NOP", 1, 7, ()), ("TEX R0, R1", 1, 7, ())])
    with pytest.raises(Unsupported, match="the modifier QUICK"):
        timed([("IADD3.QUICK R0, R1, R2, RZ", 1, 7, ())])
    with pytest.raises(Unsupported, match="a place of the shared memory that is not there, 0x10"):
        timed([("MOV R1, 0x10", 4, 7, ()), ("LDS R0, [R1]", 1, 7, ())])


# ---- the command ------------------------------------------------------------------------------------------------------


def test_an_op_is_the_reference_and_told_of(tools):
    """In a process of its own, where the recorded kernels serve tensors of the CPU."""
    command = [sys.executable, "scripts/gpu_model", "least_used", "--profile"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("least_used_kernel<float>", "cycles", "registers", "by function", "lrua.cu"):
        assert words in done.stdout


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(
        "before\n<!-- begin: scripts/gpu_model --write -->\nnvcc 13.0\n\n| one | 1,000 | 1 |\n| two | 10 | 1 |\n"
        "<!-- end: scripts/gpu_model -->\nafter\n"
    )
    return file


@pytest.mark.parametrize(
    ("cycles", "status", "says"),
    [
        ((1029, 10), 0, ""),
        ((1031, 10), 1, "one takes 1,031 cycles a step, and 1000"),
        ((900, 10), 0, "faster"),
        ((999, 11), 1, "two"),
    ],
)
def test_a_slower_kernel_fails_the_check(model, page, monkeypatch, capsys, cycles, status, says):
    import table

    found = [(name, n, f"| {name} | {n:,} | 2 |") for name, n in zip(("one", "two"), cycles, strict=True)]
    monkeypatch.setattr(table, "rows", lambda *_: iter(found))
    monkeypatch.setattr(table, "compiler", lambda: "nvcc 13.0")
    assert table.check(None, None, page) == status
    output = capsys.readouterr()
    assert says in output.out + output.err
    assert table.write(None, None, page) == 0
    assert page.read_text().startswith("before\n") and page.read_text().endswith("gpu_model -->\nafter\n")
    assert table.check(None, None, page) == 0


def test_code_of_another_compiler_is_not_compared(model, page, monkeypatch, capsys):
    import table

    monkeypatch.setattr(table, "compiler", lambda: "nvcc 14.1")
    assert table.check(None, None, page) == 0
    assert "SKIPPED" in capsys.readouterr().out

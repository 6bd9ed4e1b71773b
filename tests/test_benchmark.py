"""The benchmark harness: what it checks, what it says of two files, and its command line."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from mann_fast import cli
from mann_fast.benchmark import base, compare, cost, instructions, report
from mann_fast.benchmark.cases import DIRECTIONS, EAGER, OPS, OURS, Case, Shape, cases, has
from mann_fast.benchmark.measure import agrees, measure
from mann_fast.benchmark.memory import peak_bytes, saved_bytes
from mann_fast.ops import _register

SMALL = "T=3,B=2,N=12,D=5,R=2,H=8"
QUICK = ["--seconds", "0.01", "--shape", SMALL]


@pytest.mark.parametrize("op", OPS)
def test_every_contestant_agrees_with_the_reference(op):
    found = [
        row for case in cases(op, Shape.parse(SMALL), torch.float32) for row in measure(case, seconds=0.01)
    ]
    assert {row["direction"] for row in found} <= set(DIRECTIONS)
    assert all(row["verified"] and row["median_ms"] > 0 for row in found)
    ours = [row for row in found if row["what"] == OURS]
    assert ours and all(row["times_mann_fast"] == 1 and row["share_of_ceiling"] > 0 for row in ours)
    for direction, name in (("forward+backward", "saved_bytes"), ("forward", "peak_bytes")):
        bytes_of = {row["what"]: row[name] for row in found if row["direction"] == direction}
        assert not bytes_of or bytes_of[OURS] < bytes_of[EAGER]


def test_a_wrong_kernel_is_not_timed():
    (case,) = cases("lrua_scan", Shape.parse(SMALL), torch.float32, ("forward",))
    right = case.calls[OURS]
    wrong = dict(case.calls, wrong=lambda: (right()[0] + 0.1,), nan=lambda: (right()[0] * float("nan"),))
    rows = measure(Case(**{**vars(case), "calls": wrong}), seconds=0.01)
    answers = {row["what"]: row for row in rows}
    for name in ("wrong", "nan"):
        assert not answers[name]["verified"] and "median_ms" not in answers[name]
        assert "unverified" in report.cells(answers[name])
    assert answers[OURS]["verified"]


def test_agreement_is_of_every_number():
    x = torch.randn(50)
    assert agrees((x,), (x * (1 + 1e-5),), 1e-3)
    one = x.clone()
    one[7] += 0.1
    assert not agrees((one,), (x,), 1e-3) and not agrees((x[:4],), (x,), 1e-3)
    assert not agrees((x,), (), 1e-3)
    assert not agrees((torch.tensor([1, 2]),), (torch.tensor([2, 1]),), 1e-3)


def test_a_tie_broken_otherwise_in_a_sample_is_no_error_of_a_baseline():
    x = torch.randn(4, 5, 3)
    y = x.clone()
    y[2, 1:3] += 1
    assert not agrees((y,), (x,), 1e-3) and agrees((y,), (x,), 1e-3, 1)
    y[:, 3] += 1
    assert not agrees((y,), (x,), 1e-3, 1)


def test_saved_bytes_counts_a_storage_once():
    x = torch.randn(100, requires_grad=True)
    y = torch.randn(100)
    assert saved_bytes(lambda: ((x * y) * y).sum()) == 400
    assert saved_bytes(lambda: (x * x.detach().clone()).sum()) == 400


def test_peak_bytes_counts_what_is_held_at_a_time():
    x = torch.randn(1000)
    assert peak_bytes(lambda: x.neg(), x.device) == 4000
    assert (
        peak_bytes(lambda: x.neg().neg().neg(), x.device) == 8000
    )  # no third result while the first is held


def row(median, spread=0.01, **changes):
    fixed = {
        "op": "lrua_scan",
        "direction": "forward",
        "shape": "T=1",
        "dtype": "float32",
        "threads": 1,
        "what": OURS,
    }
    low, high = median * (1 - spread), median * (1 + spread)
    return {**fixed, "median_ms": median, "quartiles_ms": [low, high], "sgemm_ms": 10.0, **changes}


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (row(1.0), "same"),
        (row(0.7), "faster"),
        (row(1.4), "slower"),
        (row(1.1, spread=0.3), "ambiguous"),
        (row(2.0, sgemm_ms=20.0), "same"),  # the machine was half as fast
    ],
)
def test_comparison_gives_four_verdicts(after, expected):
    (found,) = compare.compare([row(1.0)], [after, row(9.0, what="another")])
    assert found["verdict"] == expected and found["ratio"][0] <= found["ratio"][1]


def test_command_writes_compares_and_reports(capsys, tmp_path):
    figures, page = tmp_path / "now.json", tmp_path / "now.html"
    arguments = ["bench", "--op", "lrua_scan", *QUICK, "--json", str(figures), "--report", str(page)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "mann_fast" in printed and "eager by products" in printed
    content = json.loads(figures.read_text())
    assert content["environment"]["torch"] == torch.__version__ and len(content["rows"]) == 6
    text = page.read_text()
    assert "lrua_scan" in text and "http" not in text and text.count("src='data:image/png") == 1
    assert cli.main(["bench", "--compare", str(figures), str(figures)]) == 0
    assert "slower" not in capsys.readouterr().out


def test_what_fails_is_named_and_not_timed():
    def failing():
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    (case,) = cases("content_read", Shape.parse(SMALL), torch.float32, ("forward",))
    rows = measure(Case(**{**vars(case), "calls": {**case.calls, "other": failing}}), seconds=0.01)
    answers = {row["what"]: row for row in rows}
    assert answers["other"]["note"] == "CUDA out of memory." and not answers["other"]["verified"]
    assert "failed: CUDA out of memory." in report.cells(answers["other"])
    assert answers[OURS]["median_ms"] > 0


def test_torch_compile_is_a_contestant(capsys, tmp_path):
    figures = tmp_path / "compiled.json"
    arguments = ["bench", "--op", "lrua_write", *QUICK, "--direction", "forward", "--json", str(figures)]
    assert cli.main([*arguments, "--compile"]) == 0
    rows = json.loads(figures.read_text())["rows"]
    assert [row["what"] for row in rows] == [OURS, EAGER, "torch.compile"]
    assert all(row["verified"] for row in rows)
    capsys.readouterr()


REQUEST = {"op": "lrua_step", "direction": "forward", "shape": str(Shape.parse(SMALL)), "dtype": "float32"}
REQUEST |= {"device": "cpu", "backend": "auto", "threads": 1}


def test_a_commit_is_measured_beside_another():
    ours, other = base.measure_beside(base.ROOT, "itself", REQUEST, seconds=0.1)
    assert (ours["what"], other["what"]) == (OURS, f"{OURS} at itself")
    assert ours["verified"] and other["verified"] and ours["median_ms"] > 0 and other["rounds"] >= 15
    assert ours["verdict"] in compare.VERDICTS


def test_a_commit_that_cannot_be_measured_is_named(tmp_path):
    (tmp_path / "mann_fast").mkdir()
    (tmp_path / "mann_fast" / "__init__.py").write_text("def backends(): return {'cpp': 'was not built'}")
    with pytest.raises(ValueError, match="cannot be measured: ImportError: the kernels in .* was not built"):
        base.measure_beside(tmp_path, "old", REQUEST, seconds=0.1)
    if shutil.which("valgrind"):
        with pytest.raises(
            ValueError, match="cannot be counted: ImportError: the kernels in .* was not built"
        ):
            instructions.count(tmp_path, [REQUEST])


def test_base_builds_a_commit_once_or_leaves_nothing(tmp_path, monkeypatch, capsys):
    def git(*arguments):
        return subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
            cwd=tmp_path, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="needs mann_fast to run from a git checkout"):
        base.build("HEAD")
    git("init", "--quiet")
    (tmp_path / ".gitignore").write_text("build\n")
    for answer, words in ((0, ""), (3, "no compiler")):
        script = f"import sys; open('built', 'w'); print({words!r}, file=sys.stderr); sys.exit({answer})"
        (tmp_path / "setup.py").write_text(script)
        git("add", ".")
        git("commit", "--quiet", "-m", f"exits with {answer}")
    with pytest.raises(ValueError, match="HEAD does not build: no compiler"):
        base.build("HEAD")
    assert list((tmp_path / "build" / "base").iterdir()) == []
    tree = base.build("HEAD~1")
    assert tree.name == git("rev-parse", "HEAD~1") and (tree / "built").exists()
    (tree / "built").unlink()
    assert base.build("HEAD~1") == tree and not (tree / "built").exists()
    with pytest.raises(ValueError, match="--base must be a commit of .*, got 'no-such-branch'"):
        base.build("no-such-branch")
    capsys.readouterr()


def test_instructions_need_valgrind(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="--instructions needs valgrind"):
        instructions.count(base.ROOT, [REQUEST])


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_instructions_are_those_of_the_calls_and_repeat():
    few = {**REQUEST, "op": "least_used", "shape": "B=2,N=12"}
    many = {**few, "shape": "B=2,N=1012"}
    answers = instructions.count(base.ROOT, [few, {**few, "op": "softmax"}, many, few])
    assert answers[1].startswith("ValueError: op must be one of")
    assert 10_000 < answers[0] and abs(answers[3] / answers[0] - 1) < instructions.MARGIN / 3
    assert 0.1 * 2 * 1000 < answers[2] - answers[0] < 10 * 2 * 1000  # about one for each number more


@pytest.mark.parametrize(
    ("ours", "theirs", "status", "printed"),
    [
        ([1020, 990], [1000, 1000], 0, "1.020"),
        (
            [1000, 1040],
            [1000, 1000],
            1,
            "lrua_step forward: 1,040 instructions, 1,000 at old, 1.040 times, a regression\n",
        ),
        ([1000, 1000], ["AttributeError: least_used", 1000], 0, "AttributeError: least_used"),
        (["TypeError: ours", 1000], [1000, 1000], 1, "TypeError: ours"),
        ([1000, 1000], ["AttributeError", "AttributeError"], 2, "there is nothing to compare with old"),
    ],
)
def test_more_instructions_than_another_commit_are_a_regression(
    capsys, monkeypatch, tmp_path, ours, theirs, status, printed
):
    asked = []

    def count(tree, requests):
        asked.append([(request["op"], request["direction"], request["shape"]) for request in requests])
        counts = dict(
            zip(("least_used", "lrua_step"), {base.ROOT: ours, tmp_path: theirs}[tree], strict=True)
        )
        return [counts[request["op"]] for request in requests]

    monkeypatch.setattr(base, "build", {"old": tmp_path}.get)
    monkeypatch.setattr(instructions, "count", count)
    arguments = ["--op", "least_used", "--op", "lrua_step", "--direction", "forward", "--shape", SMALL]
    assert cli.main(["bench", "--instructions", "--base", "old", *arguments]) == status
    assert printed in "".join(capsys.readouterr())
    assert asked[:2] == 2 * [[(op, "forward", str(Shape.parse(SMALL))) for op in ("least_used", "lrua_step")]]


@pytest.fixture
def against_a_record(capsys, monkeypatch, tmp_path):
    """Has the command compare such counts, and what was too much counted alone, with a record in which both ops take 1,000, and
    which ``change`` may change. What it said, its status and the record."""
    record = tmp_path / "recorded.json"
    monkeypatch.setattr("shutil.which", lambda name: name)  # valgrind is installed

    def run(ours, alone=(), change=lambda known: None):
        arguments = [
            "bench",
            "--instructions",
            "--op",
            "least_used",
            "--op",
            "lrua_step",
            "--direction",
            "forward",
        ]
        monkeypatch.setattr(instructions, "count", lambda tree, requests: [1000, 1000])
        assert cli.main([*arguments, "--shape", SMALL, "--json", str(record)]) == 0
        known = json.loads(record.read_text())
        change(known)
        record.write_text(json.dumps(known))
        capsys.readouterr()
        counts = [ours, alone]
        monkeypatch.setattr(instructions, "count", lambda tree, requests: counts.pop(0))
        status = cli.main([*arguments, "--shape", SMALL, "--base", str(record)])
        return "".join(capsys.readouterr()), status, record

    return run


def test_more_instructions_than_recorded_are_a_regression(against_a_record):
    said, status, record = against_a_record([1000, 1030])
    assert status == 0 and "1.030" in said and "a regression" not in said and "anew" not in said
    said, status, record = against_a_record([1000, 1050], [1030])
    assert status == 0 and "1.030" in said and "a regression" not in said
    said, status, record = against_a_record([1000, 1050], [1031])
    assert status == 1
    assert f"lrua_step forward: 1,031 instructions, 1,000 at {record}, 1.031 times, a regression\n" in said
    assert said.count("a regression") == 1
    said, status, record = against_a_record([969, 1000])  # less asks for a new record, and does not fail
    assert status == 0 and f"least_used forward: 969 instructions, 1,000 at {record}, 0.969 times\n" in said
    assert f"made anew: mann-fast bench --instructions --shape {SMALL} --json {record}" in said


def test_instructions_are_not_compared_with_a_record_of_other_versions(against_a_record, monkeypatch):
    said, status, _ = against_a_record([], change=lambda known: known["made with"].update(torch="2.0"))
    assert status == 0
    assert said == f"instructions: SKIPPED, recorded.json was made with torch 2.0, here {torch.__version__}\n"
    with monkeypatch.context() as without:
        said, status, record = against_a_record([1000, 1000])
        without.setattr("shutil.which", lambda name: None)
        assert instructions.incomparable(record) == "valgrind is not installed"


RECORD = base.ROOT / "benchmarks" / "instructions.json"


@pytest.mark.skipif(not RECORD.exists(), reason="the tests run without the source tree's benchmarks")
def test_every_op_with_a_kernel_of_the_processor_is_recorded():
    ((_, counts),) = (x for x in json.loads(RECORD.read_text()).items() if x[0] != instructions.WITH)
    assert set(counts) == {
        f"{op} {direction}" for op in OPS for direction in DIRECTIONS if has(op, direction)
    }
    here = [op for op in _register.OPS.values() if _register.has_kernels(op.name, "cpp", "cpu")]
    assert here and [op.name for op in here if not set(op.public) & set(OPS)] == []


@pytest.mark.parametrize("op", [op for op in OPS if op != "mann_step"])
def test_a_case_runs_the_kernels_of_its_op(op):
    (raw,) = (raw.name for raw in _register.OPS.values() if op in raw.public)
    for case in cases(op, Shape.parse(SMALL), torch.float32):
        with torch.profiler.profile() as profile:
            case.calls[OURS]()
        called = {event.name for event in profile.events()}
        wanted = {"forward": f"mann_fast::{raw}", "forward+backward": f"mann_fast::{raw}_backward"}
        assert wanted[case.direction] in called


def test_sweep_is_drawn_into_one_page(capsys, tmp_path, monkeypatch):
    axes = {"B": (1, 2), "N": (4, 8), "threads": (1,), "dtype": ("float64", "float16")}
    monkeypatch.setattr(cli.bench, "SWEEP", axes)
    page = tmp_path / "sweep.html"
    arguments = [
        "bench",
        "--op",
        "content_read",
        *QUICK,
        "--sweep",
        "--direction",
        "forward",
        "--report",
        str(page),
    ]
    assert cli.main(arguments) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1 and "http" not in text
    for title in ("N=4 ", "N=8 ", "float32, 1 thread<", "float64", "float16"):
        assert title in text
    markdown = tmp_path / "one.md"
    assert cli.main(["bench", "--op", "least_used", *QUICK, "--report", str(markdown)]) == 0
    assert markdown.read_text().startswith("# Benchmarks of mann_fast")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "--op must be one of cell, .* got 'softmax'"),
        (["--shape", "T=0"], "--shape takes positive numbers for T, B, N, D, R, H, .* got 'T=0'"),
        (["--shape", "Q=3"], "got 'Q=3'"),
        (["--seconds", "0"], "--seconds must be above 0, got 0.0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--report", "x.pdf"], "--report must end in .html or .md, got x.pdf"),
        (
            ["--op", "mann_step", "--dtype", "float64"],
            "mann_step is measured in float32, got --dtype float64",
        ),
        (["--op", "least_used", "--direction", "both"], "least_used cannot be measured in the direction"),
        (["--compile", "fast"], "--compile takes default, reduce-overhead, max-autotune, got 'fast'"),
        (
            ["--instructions", "--device", "cuda"],
            "--instructions counts those of a processor, got --device cuda",
        ),
        (["--base", "HEAD", "--sweep"], "--base and --sweep cannot be had in one run"),
        (["--instructions", "--sweep"], "--instructions and --sweep cannot be had in one run"),
        (["--device", "cuda"], "--device cuda cannot be had: no CUDA device is available"),
        (["--backend", "opencl"], "backend must be one of"),
        (["--backend", "cuda"], "--backend cuda cannot run here: no CUDA device is available"),
    ],
)
def test_wrong_arguments_are_named(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "--backend" in arguments and "cuda" in arguments:
        monkeypatch.setattr("mann_fast.backends", lambda: {"cuda": "no CUDA device is available"})
    assert cli.main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "Traceback" not in err


def test_files_that_are_none_are_named(capsys, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    assert cli.main(["bench", "--compare", str(bad), str(bad)]) == 2
    assert "is not a file of `mann-fast bench --json`" in capsys.readouterr().err
    bad.write_text(json.dumps({"rows": []}))
    assert cli.main(["bench", "--compare", str(bad), str(bad)]) == 2
    assert "no timed row in common" in capsys.readouterr().err


def test_flop_are_those_of_the_products():
    """Counted another way: two per multiply-add of each product that a step of the formulas has."""
    steps, batch, slots, size, heads = 3, 2, 7, 5, 2
    products = {"write": heads, "dot": heads, "norm": 1, "read": heads}  # per number of the memory
    assert cost.lrua_scan_flop(steps, batch, slots, size, heads) == 2 * steps * batch * slots * size * sum(
        products.values()
    )
    assert cost.content_read_flop(batch, slots, size, heads) == 2 * batch * slots * size * (2 * heads + 1)
    ntm = {"dot": 3, "norm": 1, "read": 2, "kept": 2, "added": 1}
    assert cost.ntm_scan_flop(1, 1, slots, size, 2, 1) == 2 * slots * size * sum(ntm.values())
    links, memory = {"become": 3, "directions": 4}, {"dot": 3, "norm": 2, "write": 2, "read": 2}
    assert cost.dnc_scan_flop(1, 1, slots, size, 2) == 2 * slots * (
        slots * sum(links.values()) + size * sum(memory.values())
    )

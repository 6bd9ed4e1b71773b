"""The kernels of another commit beside these, each in a process of its own, in turn."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .cases import OURS
from .compare import verdict

ROOT = Path(__file__).resolve().parents[2]
ROUND = 0.02  # seconds of a round, so that what passes between the processes does not count


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def build(ref: str) -> Path:
    """The files of a commit with the extension built, under build/base of this checkout; made once.

    Raises ValueError where this package is not in a git checkout, the commit is unknown, or its build fails.
    """
    if not (ROOT / ".git").exists():
        raise ValueError(f"--base needs mann_fast to run from a git checkout, and {ROOT} is none")
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except ValueError:
        raise ValueError(f"--base must be a commit of {ROOT}, got {ref!r}") from None
    tree = ROOT / "build" / "base" / commit
    if tree.exists():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as folder:
        files = Path(folder) / "files"
        _git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(files))
        _git("-C", str(files), "checkout", "--quiet", "--detach", commit)
        objects = str(ROOT / "build" / "objects")  # most of what the two commits are made of is the same
        environment = {"MANN_FAST_OBJECTS": objects, **os.environ, "MANN_FAST_REQUIRE_EXTENSION": "1"}
        if not torch.cuda.is_available():
            environment["MANN_FAST_CUDA"] = "0"
        print(f"building {ref} ({commit[:7]}) ...", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=files, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"{ref} does not build: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
        shutil.rmtree(files / "build", ignore_errors=True)
        files.rename(tree)
    return tree


class Worker:
    """worker.py on one tree."""

    def __init__(self, tree: Path, request: dict[str, Any]):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(tree), "seconds", json.dumps([request])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.tree = tree

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            words = self.process.communicate()[1].strip().splitlines()
            raise ValueError(f"{self.tree.name} cannot be measured: {words[-1] if words else 'it ended'}")
        return json.loads(line)

    def seconds(self, times: int) -> float:
        """Of one call, in a round of so many."""
        print(times, file=self.process.stdin, flush=True)
        return self.answer() / times


@contextmanager
def workers(trees: Sequence[Path], request: dict[str, Any]) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        found = []
        for tree in trees:
            worker = Worker(tree, request)
            stack.callback(worker.process.communicate)
            stack.callback(worker.process.kill)
            found.append(worker)
        yield found


def measure_beside(tree: Path, ref: str, request: dict[str, Any], *, seconds: float) -> list[dict[str, Any]]:
    """A row for these kernels and one for those of a built tree, with a verdict of `compare` in the first; untimed where a
    result is wrong.

    request: op, direction, shape, dtype, device, backend and threads. Raises ValueError where a commit lacks the op.
    """
    names = [OURS, f"{OURS} at {ref}"]
    common = {name: request[name] for name in ("op", "direction", "shape", "dtype", "threads")}
    with workers([ROOT, tree], request) as pair:
        first = [worker.answer() for worker in pair]
        rows = [
            {**common, "what": name, "verified": answer["verified"]}
            for name, answer in zip(names, first, strict=True)
        ]
        if not all(answer["verified"] for answer in first):
            return rows
        times = max(1, int(ROUND / max(answer["seconds"] for answer in first)))
        samples: list[list[float]] = [[], []]
        order, shuffled, begin = [0, 1], random.Random(0), time.perf_counter()
        while len(samples[0]) < 15 or time.perf_counter() - begin < seconds:
            shuffled.shuffle(order)
            for which in order:
                samples[which].append(pair[which].seconds(times))
    for row, found in zip(rows, samples, strict=True):
        low, median, high = statistics.quantiles(found, n=4)
        row |= {
            "median_ms": 1e3 * median,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "rounds": len(found),
            "times_mann_fast": median / statistics.median(samples[0]),
            "sgemm_ms": 1.0,  # the two ran in turn: no unit is needed to compare them
        }
    answer, low, high = verdict(rows[1], rows[0])
    rows[0] |= {"verdict": answer, "ratio": [low, high]}
    return rows

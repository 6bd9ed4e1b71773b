"""What the pytest-benchmark suites share: the cases of `mann-fast bench`, at three sizes, one benchmark per contestant."""

import pytest
import torch

from mann_fast.benchmark.cases import Shape, cases
from mann_fast.benchmark.measure import verify

SHAPES = {
    "paper": Shape(),
    "one-sample": Shape(B=1),
    "large-memory": Shape(T=10, B=1, N=4096, D=64),
}


def run(benchmark, op: str, shape: str, direction: str, name: str) -> None:
    """Check one contestant of one case, then time it; skipped, with a word, where the op has no such direction."""
    torch.manual_seed(0)
    for case in cases(op, SHAPES[shape], torch.float32, (direction,)):
        assert verify(case)[name]["verified"]
        benchmark.group = f"{op} {shape} {direction}"
        benchmark.pedantic(case.calls[name], rounds=15, warmup_rounds=2)
        return
    pytest.skip(f"{op} has no {direction}")


def suite(*ops: str):
    """A test function over these ops, for a bench_*.py file."""

    @pytest.mark.parametrize("name", ["mann_fast", "eager reference"])
    @pytest.mark.parametrize("direction", ["forward", "forward+backward"])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("op", ops)
    def test(benchmark, op, shape, direction, name):
        run(benchmark, op, shape, direction, name)

    return test

"""pytest-benchmark suite: `pytest benchmarks/bench_cell.py`; `--benchmark-compare` holds it against an earlier run."""

from suite import suite

test_cell = suite("mann_step")

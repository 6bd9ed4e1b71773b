"""pytest-benchmark suite: `pytest benchmarks/bench_sparse.py`; `--benchmark-compare` holds it against an earlier run."""

from suite import suite

test_sparse = suite("sparse_scan")

"""pytest-benchmark suite: `pytest benchmarks/bench_ntm.py`; `--benchmark-compare` holds it against an earlier run."""

from suite import suite

test_ntm = suite("ntm_scan")

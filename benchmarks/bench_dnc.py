"""pytest-benchmark suite: `pytest benchmarks/bench_dnc.py`; `--benchmark-compare` holds it against an earlier run."""

from suite import suite

test_dnc = suite("dnc_scan")

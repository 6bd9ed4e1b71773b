"""pytest-benchmark suite: `pytest benchmarks/bench_lrua.py`; `--benchmark-compare` holds it against an earlier run."""

from suite import suite

test_lrua = suite("least_used", "lrua_write", "lrua_step", "lrua_scan")

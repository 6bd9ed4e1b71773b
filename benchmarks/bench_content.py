"""pytest-benchmark suite: `pytest benchmarks/bench_content.py`; `--benchmark-compare` holds it against an earlier run."""

from suite import suite

test_content = suite("content_read")

"""The example in docs/data.md runs as written."""

import re
from pathlib import Path


def test_example():
    text = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["inputs"].shape == (50, 16, 405)
        assert names["targets"].shape == names["instance"].shape == (50, 16)

"""The examples in docs/data.md run as written, one after the other."""

import re
from pathlib import Path


def test_examples():
    text = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    first, own, workers = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(first, names)
    episode = names["episode"]
    assert episode.inputs.shape == (50, 16, 405)
    assert episode.targets.shape == episode.instance.shape == episode.classes.shape == (50, 16)
    exec(own, {})
    names = {}
    exec(workers, names)
    assert next(iter(names["loader"])).inputs.shape == (50, 16, 405)

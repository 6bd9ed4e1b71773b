"""The examples in README.md run as they are written, one after the other."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the tests run without the source tree's README.md")
def test_readme_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 2
    found = {}
    for example in examples:  # each alone
        namespace = {}
        exec(compile(example, "README.md", "exec"), namespace)
        found |= namespace
    assert found["output"].shape == (50, 16, 360)
    assert found["reads"].shape == (50, 16, 4, 40)

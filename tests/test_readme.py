"""The example in README.md runs as it is written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the tests run without the source tree's README.md")
def test_readme_example_runs():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 1
    namespace = {}
    exec(compile(examples[0], "README.md", "exec"), namespace)
    assert namespace["output"].shape == (50, 16, 360)
    assert namespace["reads"].shape == (50, 16, 4, 40)

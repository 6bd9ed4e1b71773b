"""The examples of docs/layers.md run one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "layers.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the source tree's docs")
def test_examples_of_layers_run():
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 7
    namespace = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), namespace)
    assert namespace["logits"].shape == (50, 16, 5)

"""docs/lrua-backward.md: its transcription has the gradients of autograd, and its table names what is in the kernel."""

import re
from pathlib import Path

import pytest
import torch
from cases import ORDERS, WRITE_TARGETS, distinct_state, scan_inputs, worst_error

from mann_fast import reference

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "lrua-backward.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the source tree's docs")


def transcription():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names["forward"], names["backward"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("write_target", WRITE_TARGETS)
@pytest.mark.parametrize("steps, every", [(7, 3), (6, 3), (2, 5)])
def test_gradients_are_those_of_autograd(order, write_target, steps, every):
    forward, backward = transcription()
    batch, slots, size, heads = 3, 9, 4, 2
    state = distinct_state(batch, slots, size, heads)
    inputs = scan_inputs(steps, batch, size, heads)
    inputs[0][0, 0] = 0  # a key of zeros, and slots of zeros
    state.memory[1, 2:4] = 0
    leaves = [x.clone().requires_grad_() for x in (*state[:2], *inputs)]
    expected_reads, expected = reference.lrua_scan(
        reference.LRUAState(*leaves[:2], state.usage), *leaves[2:], order=order, write_target=write_target
    )
    options = {"read_first": order == "read_first", "shared": write_target == "shared"}
    reads, memory, read_weights, usage, kept = forward(*state, *inputs, every, **options)
    for x, y in zip((reads, memory, read_weights, usage), (expected_reads, *expected), strict=True):
        assert worst_error(x.reshape(1, -1), y.reshape(1, -1)) < 1e-13

    outputs = expected_reads, expected.memory, expected.read_weights
    cotangents = [torch.randn_like(x) for x in outputs]
    wanted = torch.autograd.grad(outputs, leaves, cotangents)
    gradients = backward(*cotangents, *inputs, every, kept, **options)
    assert len(gradients) == len(wanted)
    for x, y in zip(gradients, wanted, strict=True):
        assert y.abs().max() > 0
        assert worst_error(x.reshape(1, -1), y.reshape(1, -1)) < 1e-12


def test_names_are_those_of_the_kernel():
    page = PAGE.read_text(encoding="utf-8")
    source = "".join((ROOT / name).read_text() for name in set(re.findall(r"csrc/cpu/\w+\.\w+", page)))
    rows = [
        row.split("|") for row in page[page.index("## In the kernel") :].splitlines() if row.startswith("| ")
    ]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", "|".join(row[2:]))]
    assert len(names) > 20
    missing = [name for name in names if not re.search(rf"\b{name}\b", source)]
    assert not missing

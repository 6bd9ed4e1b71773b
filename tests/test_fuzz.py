"""A few hundred of the random cases that `make fuzz` goes through; and that a wrong result is one of them."""

import fuzz
import pytest
import torch
from cases import needs_cpp

from mann_fast import ops

pytestmark = needs_cpp
CASES = 300


@pytest.mark.parametrize("part", range(4))
def test_random_cases(part):
    for number in range(part, CASES, 4):
        fault = fuzz.check(number)
        assert fault is None, f"python tests/fuzz.py --seed {number} --cases 1: {fault}"


@pytest.mark.parametrize(
    "name", ["lrua_scan", "ntm_scan", "content_read", "lrua_write", "cell", "ntm_cell", "dnc_cell"]
)
def test_a_wrong_op_is_found(name, monkeypatch):
    right = getattr(ops, name)

    def wrong(*arguments, **options):
        first, *rest = right(*arguments, **options)
        return torch.where(torch.rand_like(first) < 0.5, first * 1.001, first), *rest

    monkeypatch.setattr(ops, name, wrong)
    assert any(fuzz.check(number) for number in range(60))

"""A few hundred of the random cases that `make fuzz` goes through; and that what is a little wrong is one of them."""

import itertools

import fuzz
import pytest
import torch
from cases import needs_cpp
from fuzz_cases import FAMILIES, Case

from mann_fast import ops, reference
from mann_fast.ops._register import OPS

pytestmark = needs_cpp
CASES = 300
CALLS = {  # by family, whether by one step
    "least_used": ("least_used", None),
    "content_read": ("content", None),
    "lrua_write": ("write", None),
    "lrua_step": ("lrua", True),
    "lrua_scan": ("lrua", False),
    "ntm_address": ("address", None),
    "ntm_step": ("ntm", True),
    "ntm_scan": ("ntm", False),
    "dnc_step": ("dnc", True),
    "dnc_scan": ("dnc", False),
    "sparse_read": ("sparse_read", None),
    "sparse_step": ("sparse", True),
    "sparse_scan": ("sparse", False),
    "cell": ("cell", None),
    "ntm_cell": ("ntm_cell", None),
    "dnc_cell": ("dnc_cell", None),
    "sparse_cell": ("sparse_cell", None),
}


def test_every_public_op_is_among_them():
    assert CALLS.keys() == {name for op in OPS.values() for name in op.public}


@pytest.mark.parametrize("part", range(4))
def test_random_cases(part):
    for number in range(part, CASES, 4):
        fault = fuzz.check(number)
        assert fault is None, f"python tests/fuzz.py --seed {number} --cases 1: {fault}"


def found(name, wrong, monkeypatch, touched=None):
    """Whether the first 25 cases of this op show that it is wrong; of those alone that ``wrong`` puts down in ``touched``."""
    family, one_step = CALLS[name]
    monkeypatch.setattr(ops, name, wrong)
    cases = ((number, Case(number)) for number in itertools.count())
    of_op = (n for n, x in cases if x.family == family and one_step in (None, x.one_step))
    count = 0
    for number in of_op:
        before = len(touched or ())
        if fuzz.check(number):
            return True
        count += touched is None or len(touched) > before
        if count == 25:
            return False


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_number_is_found(name, monkeypatch):
    right = getattr(ops, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        first, *rest = result if isinstance(result, tuple) else (result,)
        other = first * 1.0001 if first.is_floating_point() else first + 1
        first = torch.where(torch.rand(first.shape) < 0.5, other, first)
        return (first, *rest) if rest else first

    assert found(name, wrong, monkeypatch)


def with_gradient(x, factor):
    """x, with a gradient that is so many times the right one."""
    return None if x is None else x.detach() + (x - x.detach()) * factor


@pytest.mark.parametrize("field", ["links", "read_sharpness", "free_gates", "write_mask", "link_sharpening"])
def test_a_wrong_gradient_is_found(field, monkeypatch):
    right, touched = ops.dnc_scan, []

    def wrong(state, interface, **options):
        if any(getattr(x, field, None) is not None for x in (state, interface)):
            touched.append(field)
        state, interface = (
            x._replace(**{field: with_gradient(getattr(x, field), 1.00001)}) if field in x._fields else x
            for x in (state, interface)
        )
        return right(state, interface, **options)

    assert found("dnc_scan", wrong, monkeypatch, touched)


@pytest.mark.parametrize(
    ("name", "option", "change"),
    [
        ("content_read", "eps", lambda eps: 1.01 * eps),
        ("lrua_scan", "usage_decay", lambda decay: 0.9999 * decay),
        ("lrua_scan", "lengths", lambda lengths: (lengths - 1).clamp_min(0)),
        ("dnc_scan", "resets", torch.zeros_like),
        ("dnc_scan", "start", lambda start: 1.00001 * start),
        ("sparse_read", "eps", lambda eps: 1.01 * eps),
        ("sparse_scan", "threshold", lambda threshold: threshold + 0.1),
        ("sparse_scan", "resets", torch.zeros_like),
        ("dnc_step", "deallocate", lambda deallocate: not deallocate),
    ],
)
def test_a_wrong_option_is_found(name, option, change, monkeypatch):
    right = getattr(ops, name)

    def wrong(*arguments, **options):
        if options.get(option) is not None:
            options[option] = change(options[option])
        return right(*arguments, **options)

    assert found(name, wrong, monkeypatch)


@pytest.mark.parametrize("family", ["lrua", "dnc", "sparse_read", "sparse"])
def test_a_wrong_choice_of_slots_is_found(family):
    cases = (Case(number) for number in itertools.count())
    case = next(x for x in cases if x.family == family and not x.one_step and x.T and x.B and x.N > 1)
    drawn = FAMILIES[family](case)
    for turned in (False, True):
        chosen = {
            name: (case.N - 1 - x if turned else x) for name, x in drawn.chosen.of(drawn.tensors).items()
        }
        with drawn.chosen.watched() as out_of_order:
            drawn.call(reference, drawn.tensors, **chosen)
        assert (max(out_of_order) > 0.01) == turned

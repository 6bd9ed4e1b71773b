"""content_read against the float64 reference, and what is special about it."""

import pytest
import torch
from cases import INTERPRETED, fixed_noise, needs_kernels, shorter, worst_error

from mann_fast import ops, reference

pytestmark = needs_kernels

SHAPES = [  # B, N, D, R
    pytest.param(2, 128, 40, 4, id="paper"),
    pytest.param(3, 7, 5, 3, id="small-odd"),
    pytest.param(1, 1, 1, 1, id="ones"),
    pytest.param(2, 65, 17, 5, id="tile-tail-5-heads"),
    pytest.param(1, 1000, 33, 9, id="many-tiles-9-heads"),
    pytest.param(1, 4096, 64, 4, id="slots-over-threads"),
    pytest.param(0, 5, 4, 2, id="empty-batch"),
]


def inputs(batch, slots, size, heads, dtype, sharpness):
    memory = torch.randn(batch, slots, size, dtype=torch.float32 if dtype.itemsize == 2 else dtype)
    key = torch.randn(batch, heads, size, dtype=dtype)
    return memory, key, 4 * torch.randn(batch, heads).to(dtype) if sharpness else None


def run(function, tensors, dtype=None):
    tensors = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * fixed_noise(x, generator).bfloat16().double()).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, [t for t in tensors if t is not None])]


@pytest.mark.parametrize("sharpness", [True, False])
@pytest.mark.parametrize("batch, slots, size, heads", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_matches_reference(batch, slots, size, heads, dtype, tolerance, sharpness):
    tensors = inputs(batch, slots, size, heads, dtype, sharpness)
    oracle = run(reference.content_read, tensors, torch.float64)
    for actual, expected in zip(run(ops.content_read, tensors), oracle, strict=True):
        assert actual.is_contiguous()
        assert worst_error(actual, expected) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "batch, slots, size, heads",
    [
        pytest.param(*shorter((90, 700, 8, 4), (2, 300, 8, 4)), id="several-parts"),
        pytest.param(*shorter((90, 513, 5, 1), (2, 300, 5, 1)), id="one-head"),
        pytest.param(*shorter((270, 260, 4, 5), (2, 260, 4, 5)), id="one-part"),
        pytest.param(*shorter((130, 385, 68, 2), (1, 300, 68, 2)), id="wide-slots"),
        pytest.param(1, 129, 44, 4, id="one-slot-beyond"),
    ],
)
def test_where_a_block_goes_through_many_slots(batch, slots, size, heads, dtype, tolerance):
    """The CUDA kernel has no more blocks than run at once, 264 of the emulated GPU: each takes 128 slots several times."""
    tensors = inputs(batch, slots, size, heads, dtype, True)
    oracle = run(reference.content_read, tensors, torch.float64)
    actual = run(ops.content_read, tensors)
    for x, expected in zip(actual, oracle, strict=True):
        assert worst_error(x, expected) < tolerance
    for x, y in zip(run(ops.content_read, tensors), actual, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size, heads", [(64, 1), (32, 3), (16, 5), (8, 2)])
def test_a_gradient_that_no_cache_keeps(size, heads, dtype, tolerance):
    """From 16 MiB on the CPU kernel writes it past the caches, where its rows are whole cache lines."""
    tensors = inputs(2, shorter(2**21 // size + 5, 300), size, heads, dtype, True)
    oracle = run(reference.content_read, tensors, torch.float64)
    for actual, expected in zip(run(ops.content_read, tensors), oracle, strict=True):
        assert worst_error(actual, expected) < tolerance


@pytest.mark.parametrize("size", [8, 40, 64, 72])
def test_a_memory_that_begins_anywhere(size):
    """Four columns at a time can be loaded only from addresses that are multiples of 16."""
    memory, key, sharpness = inputs(2, 21, size, 2, torch.float32, True)
    moved = torch.zeros(memory.numel() + 1)[1:].view_as(memory).copy_(memory)
    for x, y in zip(
        run(ops.content_read, (memory, key, sharpness)),
        ops.content_read(moved, key, sharpness),
        strict=False,
    ):
        assert worst_error(x, y) < 1e-5


def test_equal_slots_get_equal_weights_whichever_block_takes_them():
    memory = torch.randn(1, 1, 40).expand(90, 700, 40).contiguous()
    memory[:, 1::2] = torch.randn(40)
    weights = ops.content_read(memory, torch.randn(90, 4, 40), 30 * torch.randn(90, 4))[1]
    assert (weights[..., ::2] == weights[..., :1]).all() and (weights[..., 1::2] == weights[..., 1:2]).all()


def test_one_block_alone_may_have_all_the_weight():
    memory, key, _ = inputs(90, 700, 4, 1, torch.float64, False)
    memory[:, :, 0], key[:, :, 0] = -memory[:, :, 0].abs() - 1, 1
    key[:, :, 1:] = 0
    memory[:, 650, 0] = 3
    read, weights = ops.content_read(memory, key, torch.full((90, 1), 1e300, dtype=torch.float64))
    assert (weights[:, 0, 650] == 1).all() and (weights.sum(-1) == 1).all()
    assert torch.equal(read[:, 0], memory[:, 650])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, slots, size, heads", [(2, 128, 40, 4), (1, 7, 5, 3), (1, 2048, 64, 2)])
def test_half_precision_loses_no_more_than_plain_pytorch(batch, slots, size, heads, dtype):
    tensors = inputs(batch, slots, size, heads, dtype, True)
    actual = run(ops.content_read, tensors)
    assert [x.dtype for x in actual] == [dtype, torch.float32, torch.float32, dtype, dtype]
    oracle = run(reference.content_read, tensors, torch.float64)
    plain = run(reference.content_read, tensors, dtype)
    for i, (x, baseline, expected) in enumerate(zip(actual, plain, oracle, strict=True)):
        allowed = (2 if i < 2 else 3) * worst_error(baseline, expected)
        assert worst_error(x, expected) <= allowed + 1e-6


@pytest.mark.parametrize("slots", [1, 8, shorter(300, 40)])
@pytest.mark.parametrize(
    "dtype, sharpness",
    [(torch.bfloat16, 50.0), (torch.bfloat16, 300.0), (torch.float16, 300.0), (torch.float32, 2e3)],
)
def test_gradients_where_one_slot_has_all_the_weight(dtype, sharpness, slots):
    """What is left of them is a difference, of numbers that must be of the same rounding."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts a bfloat16's bits off where a GPU rounds")
    memory, key, _ = inputs(2, slots, 9, 3, dtype, False)
    tensors = memory, key, (sharpness * torch.rand(2, 3)).to(dtype)
    actual = run(ops.content_read, tensors)[2:]
    plain = run(reference.content_read, tensors, None)[2:]
    for x, y, z in zip(actual, plain, run(reference.content_read, tensors, torch.float64)[2:], strict=True):
        scale = max(1e-3, z.abs().max().item())  # of one slot they are 0
        assert (x.double() - z).abs().max() <= 3 * (y.double() - z).abs().max() + 1e-4 * scale


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e6])
def test_extreme_rows_and_keys_are_finite(scale):
    memory = torch.randn(2, 20, 6) * scale
    memory[:, 3] = 0
    key = torch.randn(2, 3, 6)
    key[:, 1] = 0
    sharpness = torch.tensor([[0.0, 1e4, -1e4]]).expand(2, 3)
    actual = run(ops.content_read, (memory, key, sharpness))
    expected = run(reference.content_read, (memory, key, sharpness), torch.float64)
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert torch.isfinite(x).all()
        assert worst_error(x, y) < 1e-2  # a sharpness of 1e4 multiplies the rounding of the cosine
    assert all(torch.isfinite(x).all() for x in actual)


def test_a_product_of_squares_beyond_the_largest_number_gives_similarity_0():
    memory, key, _ = inputs(1, 20, 6, 2, torch.float32, False)
    memory[0, 4] *= 1e12
    key[0, 1] *= 1e10
    for x, y in zip(
        run(ops.content_read, (memory, key)), run(reference.content_read, (memory, key)), strict=True
    ):
        assert torch.isfinite(y).all() and worst_error(x, y) < 1e-4


@pytest.mark.parametrize("of", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_gradients_of_large_and_small_slots(of, scale):
    """The cube of a norm's reciprocal is no float32."""
    memory, key, _ = inputs(2, 20, 6, 2, torch.float32, False)
    memory *= scale
    exact = run(reference.content_read, (memory, key), torch.float64)
    for x, y in zip(run(of.content_read, (memory, key)), exact, strict=True):
        assert worst_error(x, y) < 1e-5


def test_gradient_of_one_output_alone():
    memory, key, sharpness = (t.requires_grad_() for t in inputs(2, 19, 6, 3, torch.float64, True))
    for index in (0, 1):
        actual = torch.autograd.grad(
            ops.content_read(memory, key, sharpness)[index].square().sum(), (memory, key, sharpness)
        )
        expected = torch.autograd.grad(
            reference.content_read(memory, key, sharpness)[index].square().sum(), (memory, key, sharpness)
        )
        for x, y in zip(actual, expected, strict=True):
            assert worst_error(x, y) < 1e-12


@pytest.mark.thorough
@pytest.mark.parametrize("sharpness", [True, False])
def test_gradcheck(sharpness):
    tensors = [t if t is None else t.requires_grad_() for t in inputs(2, 5, 3, 2, torch.float64, sharpness)]
    assert torch.autograd.gradcheck(ops.content_read, tensors)


def test_equal_slots_get_equal_weights():
    memory = torch.randn(1, 1, 40).expand(1, 131, 40)
    weights = ops.content_read(memory, torch.randn(1, 4, 40))[1]
    assert (weights == weights[:, :, :1]).all()


def test_a_nan_stays_in_its_sample():
    memory, key, sharpness = inputs(3, 70, 8, 2, torch.float32, True)
    clean = run(ops.content_read, (memory, key, sharpness))
    memory[1, 66, 3] = float("nan")
    dirty = run(ops.content_read, (memory, key, sharpness))
    assert dirty[0][1].isnan().all()
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])

"""What no call takes, whatever it computes: tensors not dense, arrays as choices, sizes past counting or memory."""

import functools

import numpy as np
import pytest
import torch
from cases import needs_kernels
from test_contract import every_gradient, raw, sample

import mann_fast
from mann_fast import MANN, FewShotLearner, MemoryLayer, ops
from mann_fast.data import encode_inputs, load_omniglot
from mann_fast.layers import MemoryStack
from mann_fast.ops._register import OPS
from mann_fast.reference.cell import dnc_head_sizes, ntm_head_sizes, sparse_head_sizes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

KINDS = {
    "COO": lambda x: x.to_sparse(),
    "CSR": lambda x: (x if x.dim() > 1 else x[None]).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x[:1], x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "complex": lambda x: torch.complex(x, x),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def calls():
    """Arguments by name of every public op."""
    torch.manual_seed(0)
    B, N, D, R, H = 2, 5, 3, 2, 4
    T = 3
    state = ops.LRUAState(torch.rand(B, N, D), torch.rand(B, R, N), torch.rand(B, N))
    keys, gates = torch.rand(T, B, R, D), torch.rand(T, B, R)
    heads = ops.NTMHead(keys, gates, gates, torch.rand(T, B, R, 3), 1 + gates)
    head = ops.NTMHead(*(x[0] for x in heads))
    start = ops.NTMState(torch.rand(B, N, D), torch.rand(B, R, N), torch.rand(B, R, N))
    steps = {"write_vectors": keys, "gate_logits": gates, "sharpness": gates}
    step = {"write_vector": keys[0], "gate_logit": gates[0]}
    dnc = ops.DNCState.initial(B, N, D, R)
    many = ops.SparseState.initial(B, N, D, R, 2)
    row, one, modes = keys[:, :, 0], gates[:, :, 0], torch.rand(T, B, R, 3)
    told = ops.DNCInterface(
        *(keys, gates, row, one, row, row, gates, one, one, modes, keys, row, torch.rand(T, B, R, 2))
    )
    values = 2 * R * D + 2 * R
    cell = {
        "gates": torch.rand(T, B, 4 * H),
        "state": (torch.rand(B, H), torch.rand(B, H)),
        "reads": keys[0],
        "hidden_weight": torch.rand(4 * H, H),
        "hidden_bias": torch.rand(4 * H),
        "reads_weight": torch.rand(4 * H, R * D),
    }
    of_heads = {"head_weight": torch.rand(values, H), "head_bias": torch.rand(values)}
    values = sum(ntm_head_sizes(R, D, 1))
    of_ntm_heads = {"head_weight": torch.rand(values, H), "head_bias": torch.rand(values)}
    values = sum(dnc_head_sizes(R, D, link=True, masks=False, link_sharpening=False))
    of_dnc_heads = {"head_weight": torch.rand(values, H), "head_bias": torch.rand(values)}
    values = sum(sparse_head_sizes(R, D))
    of_sparse_heads = {"head_weight": torch.rand(values, H), "head_bias": torch.rand(values)}
    return {
        "content_read": {"memory": state.memory, "key": keys[0], "sharpness": gates[0]},
        "least_used": {"usage": state.usage, "n": 2},
        "lrua_write": {**state._asdict(), **step},
        "lrua_step": {"state": state, "key": keys[0], **step, "sharpness": gates[0]},
        "lrua_scan": {"state": state, "keys": keys, **steps},
        "ntm_address": {"memory": start.memory, "head": head, "previous": start.read_weights},
        "ntm_step": {"state": start, "read_head": head, "write_head": head, "erase": keys[0], "add": keys[0]},
        "ntm_scan": {"state": start, "read_head": heads, "write_head": heads, "erase": keys, "add": keys},
        "dnc_step": {"state": dnc, "interface": ops.DNCInterface(*(x[0] for x in told))},
        "dnc_scan": {"state": dnc, "interface": told},
        "sparse_read": {"memory": many.memory, "key": keys[0], "sharpness": gates[0], "num_reads": 2},
        "sparse_step": {
            "state": many,
            "key": keys[0],
            **step,
            "sharpness": gates[0],
            "write_gate_logit": gates[0],
        },
        "sparse_scan": {"state": many, "keys": keys, **steps, "write_gate_logits": gates},
        "cell": {**cell, "memory": state, **of_heads},
        "ntm_cell": {**cell, "memory": start, **of_ntm_heads},
        "dnc_cell": {**cell, "memory": dnc, **of_dnc_heads},
        "sparse_cell": {**cell, "memory": many, **of_sparse_heads},
    }


def replacements(value, name, kind):
    """Of every tensor in nested tuples, its name and the whole with another kind of tensor in its place."""
    if isinstance(value, torch.Tensor):
        yield name, KINDS[kind](value.float())  # there are none of integers
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", ("hidden", "cell"))
        for i, (field, part) in enumerate(zip(fields, value, strict=False)):
            for of_part, other in replacements(part, f"{name}.{field}", kind):
                parts = (*value[:i], other, *value[i + 1 :])
                yield of_part, type(value)(*parts) if hasattr(value, "_fields") else parts


@every_kind
@pytest.mark.parametrize("name", [name for op in OPS.values() for name in op.public])
def test_an_op_names_the_tensor_that_it_cannot_take(name, kind):
    function, arguments = getattr(ops, name), calls()[name]
    function(**arguments)  # these sizes have passed, which may not let others by
    for argument, value in arguments.items():
        for of_part, other in replacements(value, argument, kind):
            with pytest.raises(TypeError, match=rf"^{of_part} must .*, got .*$"):
                function(**{**arguments, argument: other})


@every_kind
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"addressing": "ntm"}, {"controller": "gru"}], ids=str)
def test_a_layer_names_the_tensor_that_it_cannot_take(options, kind, autocast):
    layer = MemoryLayer(3, 4, num_slots=5, slot_size=3, num_heads=2, **options)
    x = torch.rand(3, 2, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, state = layer(x)
        state = state.map(torch.Tensor.float)
        layer(x, state)
        with pytest.raises(TypeError, match="^x must .*, got "):
            layer(KINDS[kind](x))
        if autocast and kind == "complex":
            return  # what a state is converted from is as autocast has it
        names = []
        for name, other in replacements(state, "state", kind):
            names.append(name)
            with pytest.raises(TypeError, match=rf"^{name} must .*, got .*$"):
                layer(x, other)
    assert len(names) == len(state.flatten())


@every_kind
def test_models_and_stacks_name_what_they_cannot_take(kind):
    sizes = {"num_slots": 5, "slot_size": 3, "num_heads": 2}
    x = torch.rand(3, 2, 3)
    for module in (MANN(3, 5, 4, **sizes), MemoryStack(3, 4, bidirectional=True, **sizes)):
        with pytest.raises(TypeError, match="^x must .*, got "):
            module(KINDS[kind](x))


@pytest.mark.parametrize("kind", ["COO", "nested", "quantized"])
def test_the_methods_of_a_state_name_what_they_cannot_take(kind):
    state = MemoryLayer(3, 4, num_slots=5, slot_size=3, num_heads=2).initial_state(2)
    odd = state._replace(reads=KINDS[kind](state.reads))
    with pytest.raises(TypeError, match=r"^(states\[1\]|MemoryState).reads must be a dense tensor"):
        type(state).cat([state, odd])
    start = state.select(slice(1))
    with pytest.raises(TypeError, match="^start.reads must be a dense tensor"):
        state.reset(torch.ones(2) > 0, start._replace(reads=KINDS[kind](start.reads)))
    mask = (torch.ones(2) > 0).to_sparse()
    with pytest.raises(TypeError, match="^mask must be a dense tensor"):
        state.reset(mask)
    with pytest.raises(TypeError, match="^index must be a dense tensor"):
        state.select(mask)


def test_a_view_that_is_negated_or_conjugated_later_is_read_as_it_is():
    """They are dense, but their numbers are not those that lie in memory."""
    memory, key, sharpness = calls()["content_read"].values()
    for lazy in (torch._neg_view(key), torch.complex(key, key).conj().imag):
        for x, y in zip(
            ops.content_read(memory, lazy, sharpness),
            ops.content_read(memory, -key, sharpness),
            strict=True,
        ):
            assert lazy.is_neg() and torch.equal(x, y)


CHOICES = [
    np.array(["per_head"]),
    np.array(["lstm", "lrua"]),
    np.array("constant"),
    np.zeros((3, 3)),
    torch.zeros(30, 30),
    [],
]


@pytest.mark.parametrize("value", CHOICES, ids=lambda value: f"{type(value).__name__}{np.shape(value)}")
def test_an_array_is_no_choice(value):
    arguments = calls()
    choices = {
        "write_target": lambda: ops.lrua_write(**arguments["lrua_write"], write_target=value),
        "order": lambda: ops.ntm_step(**arguments["ntm_step"], order=value),
        "write_vector": lambda: ops.cell(**arguments["cell"], write_vector=value),
        "sharpness": lambda: MemoryLayer(3, 4, sharpness=value),
        "controller": lambda: MANN(3, 4, controller=value),
        "addressing": lambda: MemoryLayer(3, 4, addressing=value),
        "memory_start": lambda: MemoryLayer(3, 4, memory_start=value),
        "name": lambda: MemoryLayer.preset(value, 3),
        "backend": lambda: mann_fast.backend(value).__enter__(),
        "encoder": lambda: MANN(20, 4, encoder=value, image_shape=(1, 4, 4)),
        "labels": lambda: encode_inputs(torch.zeros(2, 1, 1, 4, 4), torch.zeros(2, 1), ways=2, labels=value),
        "part": lambda: load_omniglot(".", value),
    }
    for name, call in choices.items():
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got [^\n]*\Z"):
            call()
    with pytest.raises(TypeError, match="^sharpness is no option here"):
        MemoryLayer(3, 4, addressing="ntm", sharpness=value)
    with pytest.raises(TypeError, match="^return_weights must be a bool, got"):
        MemoryLayer(3, 4)(torch.zeros(2, 1, 3), return_weights=value)
    with pytest.raises(TypeError, match="^checkpoint must be a path, the name of a model or None, got"):
        FewShotLearner.load(value)


@pytest.mark.parametrize("size", [2**31, 2**40, 2**63, 2**70])
def test_sizes_that_no_kernel_counts_to(size):
    layer = MemoryLayer(3, 4, num_slots=5, slot_size=3, num_heads=2)
    makers = {
        "num_slots": lambda: MemoryLayer(3, 4, num_slots=size),
        "slot_size": lambda: MemoryLayer(3, 4, slot_size=size),
        "input_size": lambda: MemoryLayer(size, 4),
        "hidden_size": lambda: MANN(3, 4, size),
        "output_size": lambda: MemoryLayer(3, 4, output_size=size),
        "num_classes": lambda: MANN(3, size),
        "batch": lambda: layer.initial_state(size),
        "write_heads": lambda: ops.NTMState.initial(1, 2, 2, 1, size),
        "num_heads": lambda: ops.LRUAState.initial(1, 2, 2, size),
    }
    for name, make in makers.items():
        with pytest.raises(ValueError, match=rf"^{name} must be at most .* = 2147483647, got {size}$"):
            make()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_tensors_of_such_sizes(axis):
    shape = [1, 2, 3]
    shape[axis] = 2**31
    memory = torch.zeros(1, 1, 1).expand(shape)
    key = torch.zeros(1, 1, 1).expand(shape[0], 1, shape[2])
    with pytest.raises(ValueError, match=r"^memory \[B, N, D\] must have sizes of at most .*, got \["):
        ops.content_read(memory, key)


def huge(op, values):
    """The same with strides of 0 and petabytes to copy."""
    # A cell copies its gates first. Links are N^2 numbers, and still to be counted.
    squared = any(argument.names.count("N") == 2 for argument in op.arguments)
    sizes = {"B": 2**31 - 1, "T" if op.name.endswith("cell") else "N": 2**14 if squared else 2**20}
    huge = []
    for argument, value in zip(op.arguments, values, strict=False):
        one = [slice(0, 1) if name in sizes else slice(None) for name in argument.names]
        shape = [sizes.get(name, size) for name, size in zip(argument.names, value.shape, strict=True)]
        huge.append(value[tuple(one)].expand(shape))
    options = (
        sizes.get("N", 1) if name == "num_slots" else value
        for name, value in zip(op.names, values, strict=True)
    )
    return [*huge, *list(options)[len(huge) :]]


@needs_kernels
@every_gradient
@pytest.mark.parametrize("recorded", [False, True], ids=["without gradients", "with"])
def test_what_does_not_fit_in_memory_says_so_and_how_much(op, recorded):
    values = huge(op, sample(op))
    values[0].requires_grad_(recorded)
    said = rf"^{op.name} is out of memory on cpu: its outputs take [\d,]+ bytes, and copies of .* [\d,]+$"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        raw(op)(*values)


@needs_kernels
def test_the_memory_that_outputs_and_copies_would_take_is_counted():
    usage = torch.zeros(1, 1).expand(2**31 - 1, 2**20)
    expected = f"its outputs take {2 * (2**31 - 1) * 8:,} bytes, and copies .* {(2**31 - 1) * 2**20 * 4:,}$"
    with pytest.raises(torch.OutOfMemoryError, match=f"^least_used is .*: {expected}"):
        ops.least_used(usage, 2)


@needs_kernels
def test_the_memory_that_backward_lacks_is_said_too():
    B, D = 2**31 - 1, 2**20
    vectors, weights = torch.zeros(1, 1, 1).expand(B, 1, D), torch.zeros(1, 1, 1).expand(B, 1, 1)
    backward = torch.ops.mann_fast.content_read_backward
    for recorded in (False, True):
        memory = vectors.detach().requires_grad_(recorded)
        with pytest.raises(torch.OutOfMemoryError, match="^content_read_backward is out of memory on cpu"):
            backward(vectors, None, memory, vectors, None, weights, 1e-6)

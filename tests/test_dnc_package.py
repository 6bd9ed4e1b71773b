"""The package `dnc` beside ops.dnc_step, on the same values of the interface: what docs/migrating.md says of it.

Tried with dnc 1.1.0, which pins no version of torch; skipped where it is not installed.
"""

import pytest
import torch
from cases import worst_error
from torch import nn
from torch.nn import functional as F

from mann_fast import ops
from mann_fast.ops import DNCInterface, DNCState

package = pytest.importorskip("dnc", reason="dnc is not installed")
HEADS, SLOTS, SIZE, HIDDEN, BATCH = 3, 7, 5, 6, 4
NAMES = {
    "memory": "memory",
    "usage": "usage_vector",
    "precedence": "precedence",
    "links": "link_matrix",
    "read_weights": "read_weights",
    "write_weights": "write_weights",
}
ONE_WRITER = ("precedence", "links", "write_weights")  # have an axis of one write head there


def make_memory():
    torch.manual_seed(1)
    memory = package.Memory(HIDDEN, SLOTS, SIZE, HEADS, independent_linears=False).double()
    nn.init.normal_(memory.interface_weights.weight)
    return memory


def interface_of(memory, hidden):
    """What the package makes of a controller's output, in the order of ours."""
    sizes = [HEADS * SIZE, HEADS, SIZE, 1, SIZE, SIZE, HEADS, 1, 1, 3 * HEADS]
    parts = memory.interface_weights(hidden).split(sizes, 1)
    keys, sharpness, write_key, write_sharpness, erase, write_vector, free, allocation, write, modes = parts
    backward, forward, content = modes.view(-1, HEADS, 3).softmax(2).unbind(2)
    return DNCInterface(
        keys.view(-1, HEADS, SIZE).tanh(),
        F.softplus(sharpness),
        write_key.tanh(),
        F.softplus(write_sharpness)[:, 0],
        erase.sigmoid(),
        write_vector.tanh(),
        free.sigmoid(),
        allocation.sigmoid()[:, 0],
        write.sigmoid()[:, 0],
        torch.stack([backward, content, forward], 2),
    )


def there(state):
    return {
        NAMES[name]: value.unsqueeze(1) if name in ONE_WRITER else value
        for name, value in state._asdict().items()
    }


def here(hidden):
    return DNCState(
        **{name: hidden[of].squeeze(1) if name in ONE_WRITER else hidden[of] for name, of in NAMES.items()}
    )


def without_epsilon(monkeypatch):
    """Its small number stands beside norms, where ours is under a root, and in the usage, where there is none."""
    for module in ("dnc.memory", "dnc.util"):
        monkeypatch.setattr(f"{module}.δ", 0.0)


def test_a_step_from_any_state_is_the_package_s_but_for_its_epsilon(monkeypatch):
    memory = make_memory()
    state = DNCState.initial(BATCH, SLOTS, SIZE, HEADS, value=0.1, dtype=torch.float64)
    hidden = torch.randn(8, BATCH, HIDDEN, dtype=torch.float64)
    for t in range(8):
        told = interface_of(memory, hidden[t])
        if t >= 4:  # usages differ by now, so their order is the same with and without the epsilon
            read, after = memory(hidden[t], there(state))
            expected = ops.dnc_step(state, told, eps=1e-6)
            assert worst_error(read, expected[0]) < 1e-4
            assert all(
                worst_error(mine, its) < 1e-4 for mine, its in zip(expected[1], here(after), strict=True)
            )
            with monkeypatch.context() as patch:
                without_epsilon(patch)
                read, after = memory(hidden[t], there(state))
            reads, found = ops.dnc_step(state, told, eps=1e-30)
            assert worst_error(read, reads) < 1e-12
            for name, mine, its in zip(found._fields, found, here(after), strict=True):
                assert worst_error(mine, its) < 1e-12, name
        state = ops.dnc_step(state, told)[1]


def test_its_epsilon_turns_the_order_of_the_free_slots_round():
    memory = make_memory()
    with torch.no_grad():
        memory.interface_weights.weight.zero_()
        bias = memory.interface_weights.bias.zero_()
        bias[-3 * HEADS - 2 : -3 * HEADS] = 40.0  # allocate, and write all of it
        bias[-3 * HEADS - 2 - HEADS : -3 * HEADS - 2] = -40.0  # free nothing
    nothing = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    state = DNCState.initial(BATCH, SLOTS, SIZE, HEADS, dtype=torch.float64)
    hidden, written, orders = there(state), [], []
    for _ in range(3):
        _, hidden = memory(nothing, hidden)
        orders.append(hidden["write_weights"][0, 0].argsort(descending=True).tolist())
        _, state = ops.dnc_step(state, interface_of(memory, nothing))
        written.append(state.write_weights[0].argmax().item())
    assert written == [0, 1, 2]
    # Its first step sorts equal usages, in no order of its own, and leaves 1e-6, 1e-12, ... in those that it did not take.
    assert orders[1][0] not in orders[0][:4]


def test_its_usage_has_a_gradient_by_the_write_before_and_ours_has_none():
    memory = make_memory()
    weights = torch.rand(BATCH, SLOTS, dtype=torch.float64, requires_grad=True)
    state = DNCState.initial(BATCH, SLOTS, SIZE, HEADS, value=0.1, dtype=torch.float64)._replace(
        write_weights=weights / SLOTS
    )
    hidden = torch.randn(BATCH, HIDDEN, dtype=torch.float64)
    read, _ = memory(hidden, there(state))
    assert torch.autograd.grad(read.sum(), weights)[0].abs().max() > 0
    reads, _ = ops.dnc_step(state, interface_of(memory, hidden))
    (found,) = torch.autograd.grad(reads.sum(), weights, allow_unused=True)
    assert found is None or (found == 0).all()


def test_its_controller_sees_the_reads_of_the_call_before_and_not_of_the_step_before():
    torch.manual_seed(2)
    network = package.DNC(4, HIDDEN, num_hidden_layers=1, nr_cells=SLOTS, read_heads=HEADS, cell_size=SIZE)
    x = torch.randn(1, 3, 4)
    h = torch.zeros(1, 1, HIDDEN)
    with torch.no_grad():
        outputs = []
        for scale in (1.0, 5.0):  # what is written, and so what is read
            network.memories[0].interface_weights.weight.mul_(scale)
            seen = []
            hook = network.lstm_layer_0.register_forward_hook(
                lambda *call, seen=seen: seen.append(call[1][0])
            )
            network(x, ([(h, h)], None, None))
            hook.remove()
            outputs.append(torch.cat(seen, 1))
    assert torch.equal(outputs[0], outputs[1]) and (outputs[0][..., 4:] == 0).all()
    assert network(x)[0].shape == (1, 3, 4)  # as wide as the input
    with pytest.raises(IndexError):
        network(nn.utils.rnn.pack_sequence([x[0]]))
    first, second = (network(x, reset_experience=True)[0] for _ in range(2))
    assert not torch.equal(first, second)  # its controller starts at random

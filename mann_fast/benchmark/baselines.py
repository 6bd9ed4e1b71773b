"""What people would use instead of the fused ops: the same computation in plain PyTorch, as fast as it goes there, or with the
fused step in a loop of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..models import MANN
from ..reference import cell
from ..reference.lrua import LRUAState


def lrua_step_by_products(
    state: LRUAState,
    key: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    sharpness: Tensor,
    *,
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, LRUAState]:
    """One step by matrix products and topk: what a careful user of PyTorch writes.

    Faster than :mod:`mann_fast.reference`, but it does not compute the same: equal slots get unequal last bits from a
    matrix product, and topk leaves ties open. Of the options it has the default order and write target only.
    """
    assert order == "write_first" and write_target == "per_head"
    memory, read_weights, usage = state
    slots = torch.topk(usage, key.shape[1], largest=False, sorted=True).indices
    gate = torch.sigmoid(gate_logit).unsqueeze(2)
    write_weights = (gate * read_weights).scatter_add(2, slots.unsqueeze(2), 1 - gate)
    not_erased = torch.ones_like(usage).scatter(1, slots[:, :1], 0.0)
    memory = torch.baddbmm(memory * not_erased.unsqueeze(2), write_weights.transpose(1, 2), write_vector)
    norms = key.square().sum(2, keepdim=True) * memory.square().sum(2).unsqueeze(1)
    similarity = (key @ memory.transpose(1, 2)) * torch.rsqrt(norms + eps)
    weights = torch.softmax(similarity * sharpness.unsqueeze(2), 2)
    usage = usage_decay * usage + (weights.detach() + write_weights.detach()).sum(1)
    return weights @ memory, LRUAState(memory, weights, usage)


def scan(step, state: LRUAState, *inputs: Tensor) -> tuple[Tensor, LRUAState]:
    """A loop of steps over inputs with a leading T."""
    reads = []
    for t in range(inputs[0].shape[0]):
        read, state = step(state, *(x[t] for x in inputs))
        reads.append(read)
    return torch.stack(reads), state


def cell_step(gates: Tensor, *state_and_weights) -> tuple:
    """One step of a MANN by matrix products, with the default options, for a loop over steps."""
    return cell(gates.unsqueeze(0), *state_and_weights, step=lrua_step_by_products)


def fused_cell_step(gates: Tensor, *state_and_weights) -> tuple:
    """The same with the fused memory step: what a MANN is where the whole sequence is not one call."""
    return cell(gates.unsqueeze(0), *state_and_weights, step=ops.lrua_step)


def mann_by_steps(model: MANN, x: Tensor, one_step: Callable = cell_step) -> Tensor:
    """A MANN's logits [T, B, classes] by a loop over steps, on the parameters of a model with default options."""
    layer = model.layer
    lstm, heads = layer.controller, layer.heads
    reads_size = layer.num_heads * layer.slot_size
    input_weight, reads_weight = lstm.weight_ih.split([layer.input_size, reads_size], dim=1)
    weights = (lstm.weight_hh, lstm.bias_hh, reads_weight, heads.weight, heads.bias)
    controller, memory, reads = layer.initial_state(x.shape[1])
    outputs = []
    for gates in F.linear(x, input_weight, lstm.bias_ih).unbind(0):
        # With --base these are the functions of another commit, which may give no reads beside the output.
        output, controller, memory, *_ = one_step(gates, controller, memory, reads, *weights)
        outputs.append(output[0])
        reads = output[0, :, layer.hidden_size :].unflatten(1, reads.shape[1:])
    return model.classifier(torch.stack(outputs))

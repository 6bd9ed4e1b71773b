"""The same MANN in JAX: ``lax.scan`` over the steps, the training step under one ``jit``. Needs the package jax."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from ..models import MANN
from ..reference.cell import SHARPNESS_MIN, SHARPNESS_SCALE


def _parameters(model: MANN) -> list[jax.Array]:
    return [jnp.asarray(p.detach().numpy()) for p in model.parameters()]


def _logits(parameters: list[jax.Array], x: jax.Array, num_slots: int, heads: int) -> jax.Array:
    weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias, out_weight, out_bias = parameters
    batch, inputs = x.shape[1:]
    hidden_size = weight_hh.shape[1]
    reads_size = weight_ih.shape[1] - inputs
    size = reads_size // heads
    recurrent = jnp.concatenate([weight_hh, weight_ih[:, inputs:]], axis=1).T
    gates = x @ weight_ih[:, :inputs].T + bias_ih + bias_hh

    def step(carry, gates):
        output, cell, memory, read_weights, usage = carry
        input_gate, forget_gate, cell_gate, output_gate = jnp.split(gates + output @ recurrent, 4, axis=1)
        cell = jax.nn.sigmoid(forget_gate) * cell + jax.nn.sigmoid(input_gate) * jnp.tanh(cell_gate)
        hidden = jax.nn.sigmoid(output_gate) * jnp.tanh(cell)
        raw = hidden @ head_weight.T + head_bias
        key = jnp.tanh(raw[:, :reads_size]).reshape(batch, heads, size)
        vector = jnp.tanh(raw[:, reads_size : 2 * reads_size]).reshape(batch, heads, size)
        gate = jax.nn.sigmoid(raw[:, 2 * reads_size : 2 * reads_size + heads])[..., None]
        beta = SHARPNESS_MIN + SHARPNESS_SCALE * jax.nn.softplus(raw[:, 2 * reads_size + heads :])
        _, slots = jax.lax.top_k(-usage, heads)
        target = jax.nn.one_hot(slots, num_slots, dtype=x.dtype)
        write_weights = gate * read_weights + (1 - gate) * target
        memory = memory * (1 - target[:, 0])[..., None] + jnp.einsum("brn,brd->bnd", write_weights, vector)
        norms = jnp.square(key).sum(2)[..., None] * jnp.square(memory).sum(2)[:, None]
        similarity = jnp.einsum("brd,bnd->brn", key, memory) * jax.lax.rsqrt(norms + 1e-6)
        read_weights = jax.nn.softmax(beta[..., None] * similarity, axis=2)
        reads = jnp.einsum("brn,bnd->brd", read_weights, memory)
        usage = 0.95 * usage + jax.lax.stop_gradient(read_weights + write_weights).sum(1)
        output = jnp.concatenate([hidden, reads.reshape(batch, -1)], axis=1)
        return (output, cell, memory, read_weights, usage), output

    first = jax.nn.one_hot(jnp.zeros(batch, int), num_slots, dtype=x.dtype)
    start = (
        jnp.zeros((batch, hidden_size + reads_size)),
        jnp.zeros((batch, hidden_size)),
        jnp.full((batch, num_slots, size), 1e-6),
        jnp.repeat(first[:, None], heads, axis=1),
        first,
    )
    _, outputs = jax.lax.scan(step, start, gates)
    return outputs @ out_weight.T + out_bias


def _loss(parameters, x, targets, num_slots, heads):
    scores = jax.nn.log_softmax(_logits(parameters, x, num_slots, heads))
    return -jnp.take_along_axis(scores, targets[..., None], axis=2).mean()


def training_step(model: MANN, x: Tensor, targets: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A training step (gradients and Adam). The first call returns loss and gradients, to be checked."""
    layer = model.layer
    x, targets = jnp.asarray(x.numpy()), jnp.asarray(targets.numpy())

    @jax.jit
    def step(parameters, first, second, count):
        loss, gradients = jax.value_and_grad(_loss)(parameters, x, targets, layer.num_slots, layer.num_heads)
        count = count + 1
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients, strict=True)]
        second = [0.999 * v + 0.001 * g * g for v, g in zip(second, gradients, strict=True)]
        rate = 1e-3 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        parameters = [
            p - rate * m / (jnp.sqrt(v) + 1e-8) for p, m, v in zip(parameters, first, second, strict=True)
        ]
        return loss, gradients, (parameters, first, second, count)

    parameters = _parameters(model)
    zeros = [jnp.zeros_like(p) for p in parameters]
    state = [(parameters, zeros, zeros, 0.0)]
    calls = [0]

    def run():
        loss, gradients, state[0] = jax.block_until_ready(step(*state[0]))
        calls[0] += 1
        return tuple(torch.tensor(jax.device_get(g)) for g in (loss, *gradients)) if calls[0] == 1 else ()

    return run

"""ntm_scan in Triton for a memory too large for one program: a loop of steps, each a content_read and PyTorch operations.

content_read goes over the memory, which is the most of a step, in tiles split over programs. What a head does with its
content weights is a few operations on [B, HEADS, N], and the write one or two on the memory for each head. Backward is by the
same formulas, from the same anchors and weights, as csrc/cpu/ntm.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.ntm import NTMHead
from ._steps import anchored_memory, begin, begin_backward, product
from .content import content_read, content_read_backward


def _of(heads: NTMHead, chosen: slice) -> NTMHead:
    return NTMHead(*(x[:, chosen].contiguous() for x in heads))


def _row(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).unsqueeze(2)


def _moves(heads: NTMHead, like: Tensor) -> list[tuple[int, Tensor]]:
    """By how many slots, and how much of it, [B, HEADS, 1]."""
    reach = heads.shift.shape[2] // 2
    return [(j - reach, _row(heads.shift[:, :, j], like)) for j in range(heads.shift.shape[2])]


class _Addressed(NamedTuple):
    content: Tensor
    gated: Tensor
    greatest: Tensor
    relative: Tensor
    weights: Tensor


def _address(memory: Tensor, heads: NTMHead, previous: Tensor, eps: float) -> _Addressed:
    """Graves et al. 2014, eqs. 5-9; at least one head."""
    _, by_content = content_read(memory, heads.key, heads.sharpness, eps)
    gate = _row(heads.gate, memory)
    gated = gate * by_content + (1 - gate) * previous
    shifted = sum(share * gated.roll(by, 2) for by, share in _moves(heads, memory))
    greatest = shifted.amax(2, keepdim=True)
    relative = shifted / greatest
    powers = relative ** _row(heads.sharpening, memory)
    return _Addressed(by_content, gated, greatest, relative, powers / powers.sum(2, keepdim=True))


def _address_backward(grad: Tensor, memory: Tensor, heads: NTMHead, previous: Tensor, eps: float):
    """From the gradient of the weights: those of the memory, of what the heads were given, and of the weights before."""
    x = _address(memory, heads, previous, eps)
    gamma, gate = _row(heads.sharpening, memory), _row(heads.gate, memory)
    centred = grad - (x.weights * grad).sum(2, keepdim=True)
    of_gamma = (x.weights * centred * torch.where(x.relative > 0, x.relative, 1).log()).sum(2)
    # A weight over its power is the same for all slots, the greatest weight, for there the power is 1.
    of_shifted = x.relative ** (gamma - 1) * centred * (gamma * x.weights.amax(2, keepdim=True) / x.greatest)
    moves = _moves(heads, memory)
    of_shift = torch.stack([(of_shifted * x.gated.roll(by, 2)).sum(2) for by, _ in moves], 2)
    of_gated = sum(share * of_shifted.roll(-by, 2) for by, share in moves)
    of_gate = (of_gated * (x.content - previous)).sum(2)
    of_memory, of_key, of_sharpness = content_read_backward(
        None, of_gated * gate, memory, heads.key, heads.sharpness, x.content, eps
    )
    return of_memory, NTMHead(of_key, of_sharpness, of_gate, of_shift, of_gamma), of_gated * (1 - gate)


def _erase_and_add(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """weights [B, W, N], erase and add [B, W, D]."""
    kept, added = memory, torch.zeros_like(memory)
    for w in range(weights.shape[1]):
        weight = weights[:, w, :, None]
        kept = kept * (1 - weight * erase[:, w, None, :].to(memory.dtype))
        added = torch.addcmul(added, weight, add[:, w, None, :].to(memory.dtype))
    return kept + added


def _erase_and_add_backward(grad: Tensor, memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor):
    """Gradients of memory, weights, erase and add; nothing is divided by what an erase has left."""
    wide_erase, wide_add = erase.to(memory.dtype), add.to(memory.dtype)
    heads = range(weights.shape[1])
    left = [1 - weights[:, w, :, None] * wide_erase[:, w, None, :] for w in heads]
    of_weights, of_erase = torch.empty_like(weights), torch.empty_like(wide_erase)
    for w in heads:
        erased = grad * memory
        for v in heads:
            if v != w:
                erased = erased * left[v]
        of_erase[:, w] = -(erased * weights[:, w, :, None]).sum(1)
        of_weights[:, w] = (grad * wide_add[:, w, None, :] - erased * wide_erase[:, w, None, :]).sum(2)
    of_add = product(weights, grad)
    for one in left:
        grad = grad * one
    return grad, of_weights, of_erase, of_add


def scan(memory, weights, inputs, sequences, reads, history, anchors, read_first, eps, anchor_every):
    """Writes reads, history and anchors; the memory and the weights after the last step."""
    writes, all_heads = inputs[-1].shape[2], weights.shape[1]
    first = all_heads - writes
    reading, writing = slice(0, first), slice(first, all_heads)
    memory, weights = memory.clone(), weights.clone()
    for t in range(reads.shape[0]):
        came = memory, weights
        memory, weights = begin(sequences, t, memory, weights)
        if anchor_every > 0 and t > 0 and t % anchor_every == 0:
            anchored_memory(anchors[t // anchor_every - 1], memory).copy_(memory)
        *heads, erase, add = sequences.inputs(t, *(x[t] for x in inputs))
        now, before = torch.empty_like(weights), memory
        # Those of a memory together.
        groups = [slice(0, all_heads)] if read_first else [writing, reading]
        for group in groups:
            if group.stop > group.start:
                previous = weights[:, group].contiguous()
                now[:, group] = _address(memory, _of(NTMHead(*heads), group), previous, eps).weights
            if group is not reading and writes:
                memory = _erase_and_add(memory, now[:, writing], erase, add)
        read = product(now[:, reading], before if read_first else memory).to(reads.dtype)
        (reads[t],) = sequences.outputs(t, read)
        if anchor_every > 0:
            history[t] = now
        memory, weights = sequences.end(t, (memory, now), came)
    return memory, weights


def scan_backward(
    grads, memory, weights, inputs, sequences, history, anchors, read_first, eps, every, results, grad_start
):
    """Writes the gradients of the inputs into ``results`` and adds to that of the start; those of the memory and the
    weights."""
    grad_reads, grad_memory, grad_weights = grads
    steps, writes, all_heads = inputs[-1].shape[0], inputs[-1].shape[2], weights.shape[1]
    first_write = all_heads - writes
    reading, writing = slice(0, first_write), slice(first_write, all_heads)
    grad_memory = torch.zeros_like(memory) if grad_memory is None else grad_memory.clone()
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights.clone()

    def through_reads(t, addressed):
        if grad_reads is None or first_write == 0:
            return
        wide = grad_reads[t].to(memory.dtype)
        grad_weights[:, reading] += product(wide, addressed.transpose(1, 2))
        grad_memory.add_(product(history[t][:, reading].transpose(1, 2), wide))

    def through_heads(t, group, addressed, heads, previous):
        if group.stop == group.start:
            return
        of_memory, of_heads, of_previous = _address_backward(
            grad_weights[:, group].contiguous(),
            addressed,
            _of(NTMHead(*heads), group),
            previous[:, group].contiguous(),
            eps,
        )
        grad_memory.add_(of_memory)
        grad_weights[:, group] = of_previous
        for result, of in zip(results, sequences.outputs(t, *of_heads), strict=False):
            result[t][:, group] = of

    for first in reversed(range(0, steps, every)):
        last = min(first + every, steps)
        now, replayed = memory, []
        if first > 0:
            now = anchored_memory(anchors[first // every - 1], memory).contiguous()
        for t in range(first, last):
            before, previous = begin(sequences, t, now, history[t - 1] if t > 0 else weights)
            *heads, erase, add = sequences.inputs(t, *(x[t] for x in inputs))
            if not read_first or t < last - 1:
                now = _erase_and_add(before, history[t][:, writing], erase, add)
            replayed.append((before, previous, now, heads, erase, add))
        for t in reversed(range(first, last)):
            before, previous, after, heads, erase, add = replayed[t - first]
            of_after = grad_memory, grad_weights
            if sequences.lengths is not None:  # where a sample has ended these go on as they are
                grad_memory, grad_weights = grad_memory.clone(), grad_weights.clone()
            if not read_first:
                through_reads(t, after)
                through_heads(t, reading, after, heads, previous)
            if writes:
                of_memory, of_weights, *of_written = _erase_and_add_backward(
                    grad_memory, before, history[t][:, writing], erase, add
                )
                results[5][t], results[6][t] = sequences.outputs(t, *of_written)
                grad_memory.copy_(of_memory)
                grad_weights[:, writing] += of_weights
            if read_first:
                through_reads(t, before)
            through_heads(t, slice(0, all_heads) if read_first else writing, before, heads, previous)
            grad_memory, grad_weights = begin_backward(
                sequences, t, grad_memory, grad_weights, of_after, grad_start
            )
    return grad_memory, grad_weights

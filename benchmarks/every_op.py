"""Every op with GPU kernels once, small, forward and backward: what a smoke test and compute-sanitizer run.

python benchmarks/every_op.py BACKEND
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def every_op(backend: str) -> None:
    """Both orders, one program and several per sample, with and without what samples begin and end with."""
    from mann_fast import MemoryLayer, ops
    from mann_fast import backend as use
    from mann_fast.reference.cell import CONTROLLERS, head_sizes

    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()  # else emulated kernels: make emulate

    def cut(steps: int, *sizes: int) -> dict[str, torch.Tensor]:
        """Two samples, one of which ends early, and where they begin anew."""
        resets = torch.arange(2 * steps).view(steps, 2) % 3 == 0
        return {
            "resets": resets,
            "lengths": torch.tensor([steps, steps - 1]),
            "start": torch.randn(sizes, requires_grad=True),
        }

    with use(backend), torch.device("cuda" if on_gpu else "cpu"):
        for slots, size, heads in ((128, 40, 4), (33, 17, 3), (700, 64, 2)):
            for order in ("write_first", "read_first"):
                state = ops.LRUAState.initial(2, slots, size, heads)
                keys, vectors = (torch.randn(11, 2, heads, size, requires_grad=True) for _ in range(2))
                gates = torch.randn(11, 2, heads, requires_grad=True)
                for sequences in ({}, cut(11, slots, size)):
                    reads, end = ops.lrua_scan(state, keys, vectors, gates, gates, order=order, **sequences)
                    (reads.sum() + end.memory.sum()).backward()
                end = [x.detach().requires_grad_() for x in end]
                read, weights = ops.content_read(end[0], keys[0], gates[0])
                memory, write_weights = ops.lrua_write(*end, vectors[0], gates[0])
                (read.sum() + weights.square().sum() + memory.sum() + write_weights.square().sum()).backward()
        for slots, size, heads, hidden in ((128, 40, 4, 200), (33, 17, 3, 50), (300, 24, 2, 100)):
            for controller, (gates, states) in CONTROLLERS.items():
                wanted = lambda *sizes: (0.1 * torch.randn(sizes)).requires_grad_()  # noqa: E731
                values = sum(head_sizes(heads, size, "separate", "learned"))
                for sequences in ({}, cut(3, slots, size)):
                    output, *_, reads = ops.cell(
                        wanted(3, 2, gates * hidden),
                        tuple(torch.randn(2, hidden) for _ in states),
                        ops.LRUAState.initial(2, slots, size, heads),
                        torch.randn(2, heads, size),
                        *(
                            (wanted(gates * hidden, hidden), wanted(gates * hidden))
                            if states
                            else (None, None)
                        ),
                        wanted(gates * hidden, heads * size),
                        wanted(values, hidden),
                        wanted(values),
                        controller=controller,
                        **sequences,
                    )
                    (output.sum() + reads.sum()).backward()
        for slots, size in ((128, 20), (33, 17), (700, 64)):
            for order in ("write_first", "read_first"):
                keys = torch.randn(11, 2, 2, size, requires_grad=True)
                shares, shift = torch.rand(11, 2, 2), torch.softmax(torch.randn(11, 2, 2, 3), 3)
                head = ops.NTMHead(keys, 5 * shares, shares, shift, 1 + shares)
                state = ops.NTMState.initial(2, slots, size, 2, 2)
                written = torch.sigmoid(keys), torch.tanh(keys)
                for sequences in ({}, cut(11, slots, size)):
                    reads, end = ops.ntm_scan(state, head, head, *written, order=order, **sequences)
                    (reads.sum() + end.memory.sum()).backward(retain_graph=True)
        for slots, size, heads in ((128, 40, 4), (33, 17, 3), (300, 24, 2)):
            for link in (True, False):
                begin = ops.DNCState.initial(2, slots, size, heads, link=link)
                keys, masks = (
                    torch.randn(11, 2, heads, size, requires_grad=True),
                    torch.rand(11, 2, heads, size),
                )
                vector, gates = torch.rand(11, 2, size), torch.rand(11, 2, heads)
                modes = (
                    (torch.rand(11, 2, heads, 3), 1 + torch.rand(11, 2, heads, 2)) if link else (None, None)
                )
                told = ops.DNCInterface(
                    keys, 1 + gates, vector, 1 + gates[..., 0], vector, vector, gates, gates[..., 0], gates[..., 0],
                    modes[0], masks, vector, modes[1],
                )  # fmt: skip
                for sequences in ({}, cut(11, slots, size)):
                    reads, end = ops.dnc_scan(begin, told, deallocate=True, **sequences)
                    (reads.sum() + end.memory.sum()).backward()
        for slots, size, heads, reads in ((128, 40, 4, 4), (33, 17, 3, 33), (20_000, 32, 1, 4)):
            state = ops.SparseState.initial(2, slots, size, heads, reads)
            state = state._replace(memory=torch.randn(2, slots, size, requires_grad=True))
            keys, gates = torch.randn(5, 2, heads, size, requires_grad=True), torch.randn(5, 2, heads)
            for sequences in ({}, cut(5, slots, size)):
                found, end = ops.sparse_scan(state, keys, keys, gates, gates.exp(), gates, **sequences)
                read, _, weights = ops.sparse_read(state.memory, keys[0], num_reads=reads)
                (found.sum() + end.memory.sum() + read.sum() + weights.square().sum()).backward()
            sizes = {"num_slots": slots, "slot_size": size, "num_heads": heads, "num_reads": reads}
            layer = MemoryLayer(
                3, 10, addressing="sparse", memory_start="learned", **sizes
            )  # its steps in place
            flags = {name: x for name, x in cut(5, 1).items() if name != "start"}
            layer(torch.randn(5, 2, 3), **flags)[0].sum().backward()
    if on_gpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("one backend is needed: python benchmarks/every_op.py cuda")
    every_op(sys.argv[1])

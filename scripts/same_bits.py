"""Compares outputs and gradients of this checkout with those of another commit, bit for bit, on the CPU: every public op over
its options, dtypes and shapes, every option of MemoryLayer, and MANN.

    python scripts/same_bits.py --base COMMIT [--threads N]

For a change that is to leave every result as it was. The other commit is built under build/base, as for
`mann-fast bench --base`. Exit status 1 if a bit differs, or if one of them lacks a case.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
SHAPES = [  # T, B, N, D, R
    (12, 3, 128, 40, 4),
    (5, 17, 9, 5, 3),
    (3, 1, 1, 1, 1),
    (0, 2, 5, 4, 2),
    (3, 0, 5, 4, 2),
    (20, 2, 40, 3, 2),
    (2, 1, 3000, 17, 5),
]
STEPS = [
    {"order": order, "write_target": target}
    for order, target in itertools.product(("write_first", "read_first"), ("per_head", "shared"))
]
HEADS = [
    {"write_vector": vector, "sharpness": sharpness}
    for vector, sharpness in itertools.product(("separate", "key"), ("learned", None, 2.5))
]

Case = tuple[str, Callable[[], list[torch.Tensor | None]]]


def flat(value: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def with_gradients(function: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """What a function gives, and the gradients of a fixed random functional of it."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    results = flat(function(*leaves))
    generator = torch.Generator().manual_seed(1)
    weighed = [
        (x.double() * torch.randn(x.shape, generator=generator).double()).sum()
        for x in results
        if x.requires_grad
    ]
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(sum(weighed), wanted, allow_unused=True) if weighed else ()
    return [*results, *gradients]


def draw(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*sizes).to(dtype)


def op_cases() -> Iterator[Case]:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        yield from lrua_cases(*shape, dtype)
        for order, moves, heads in itertools.product(
            ("read_first", "write_first"), (3, 5), ((shape[4], 1), (0, 2), (2, 0))
        ):
            name = f"ntm_scan {shape} {dtype} {order} {moves} {heads}"
            yield name, partial(ntm_case, *shape[:4], *heads, moves, dtype, order)


def lrua_cases(
    steps: int, batch: int, slots: int, size: int, heads: int, dtype: torch.dtype
) -> Iterator[Case]:
    from mann_fast import ops

    wide = torch.float32 if dtype in HALVES else dtype
    where = f"{(steps, batch, slots, size, heads)} {dtype}"

    def state() -> list[torch.Tensor]:
        order = torch.stack([torch.randperm(slots) for _ in range(batch)]) if batch else torch.zeros(0, slots)
        usage = (order * 0.037 + 0.01 * torch.rand(batch, slots)).to(wide)
        return [
            draw(batch, slots, size, dtype=wide),
            torch.softmax(draw(batch, heads, slots, dtype=wide), -1),
            usage,
        ]

    def inputs(*leading: int) -> list[torch.Tensor]:
        vectors = [draw(*leading, size, dtype=dtype) for _ in range(2)]
        return [*vectors, draw(*leading, dtype=dtype), 3 * draw(*leading, dtype=dtype)]

    def content() -> list[torch.Tensor | None]:
        memory, (key, other, _, sharpness) = state()[0], inputs(batch, heads)
        first = with_gradients(ops.content_read, [memory, key, sharpness])
        return first + with_gradients(ops.content_read, [memory, other])

    def write(write_target: str, **_: str) -> list[torch.Tensor | None]:
        _, vector, gate, _ = inputs(batch, heads)
        return with_gradients(partial(ops.lrua_write, write_target=write_target), [*state(), vector, gate])

    def run(function: Callable[..., Any], *leading: int, **options: str) -> list[torch.Tensor | None]:
        def call(memory, weights, usage, *tensors):
            return function(ops.LRUAState(memory, weights, usage), *tensors, **options)

        tensors = [*state(), *inputs(*leading)]
        return with_gradients(call, tensors) + with_gradients(call, tensors[:-1])

    yield f"content_read {where}", content
    yield f"least_used {where}", lambda: [ops.least_used(state()[2], heads)]
    for options in STEPS:
        yield f"lrua_write {where} {options}", partial(write, **options)
        yield f"lrua_step {where} {options}", partial(run, ops.lrua_step, batch, heads, **options)
        yield f"lrua_scan {where} {options}", partial(run, ops.lrua_scan, steps, batch, heads, **options)


def ntm_case(
    steps: int,
    batch: int,
    slots: int,
    size: int,
    reading: int,
    writing: int,
    moves: int,
    dtype: torch.dtype,
    order: str,
) -> list[torch.Tensor | None]:
    from mann_fast import ops

    wide = torch.float32 if dtype in HALVES else dtype

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(steps, batch, *sizes)

    def head(count: int) -> list[torch.Tensor]:
        shift = torch.softmax(normal(count, moves), -1)
        scalars = normal(count).exp(), torch.sigmoid(normal(count)), shift, 1 + normal(count).square()
        return [x.to(dtype) for x in (normal(count, size), *scalars)]

    tensors = [draw(batch, slots, size, dtype=wide)]
    tensors += [torch.softmax(draw(batch, count, slots, dtype=wide), -1) for count in (reading, writing)]
    tensors += [*head(reading), *head(writing)]
    tensors += [torch.sigmoid(normal(writing, size)).to(dtype), normal(writing, size).to(dtype)]

    def call(*x):
        state, heads = ops.NTMState(*x[:3]), (ops.NTMHead(*x[3:8]), ops.NTMHead(*x[8:13]))
        return ops.ntm_scan(state, *heads, *x[13:], order=order)

    return with_gradients(call, tensors)


def layer_cases() -> Iterator[Case]:
    from mann_fast import MANN, MemoryLayer

    sizes = {"num_slots": 9, "slot_size": 5, "num_heads": 3}
    lrua = [{**options, **heads} for options, heads in itertools.product(STEPS, HEADS)]
    lrua += [{"usage_decay": 0.5, "eps": 1e-3}]
    ntm = [
        {"addressing": name, "order": order}
        for name in ("ntm", "content")
        for order in ("read_first", "write_first")
    ]
    ntm += [{"addressing": "ntm", "max_shift": 2}]
    more = [{}, {"memory_start": "learned"}, {"output_size": 4, "batch_first": True}]

    def run(layer: torch.nn.Module, x: torch.Tensor, **options: Any) -> list[torch.Tensor | None]:
        parameters = list(layer.parameters())

        def forward(x, *_):
            first, state = layer(x, **options)[:2]
            return first, layer(x, state, **options)

        results = flat(forward(x.requires_grad_()))
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (y.double() * torch.randn(y.shape, generator=generator).double()).sum()
            for y in results
            if y.requires_grad
        )
        return [*parameters, *results, *torch.autograd.grad(loss, [x, *parameters], allow_unused=True)]

    def make(
        options: dict[str, Any], dtype: torch.dtype, **call: Any
    ) -> Callable[[], list[torch.Tensor | None]]:
        return lambda: run(
            MemoryLayer(6, 7, **sizes, **options, dtype=dtype), torch.randn(5, 2, 6).to(dtype), **call
        )

    for controller, options, extra, dtype in itertools.product(
        ("lstm", "gru", "feedforward"), lrua + ntm, more, DTYPES[:3]
    ):
        both = {"controller": controller, **options, **extra}
        yield f"MemoryLayer {both} {dtype}", make(both, dtype)
    for options in (*lrua[:6], *ntm):
        yield f"MemoryLayer {options} return_weights", make(options, torch.float32, return_weights=True)

        def unbatched(options=options):
            return run(MemoryLayer(6, 7, **sizes, **options), torch.randn(5, 6))

        def autocast(options=options):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(MemoryLayer(6, 7, **sizes, **options), torch.randn(5, 2, 6))

        yield f"MemoryLayer {options} unbatched", unbatched
        yield f"MemoryLayer {options} autocast", autocast
    for name in ("santoro2016", "theano-ntm-one-shot", "snowkylin", "snowkylin-2", "graves2014"):
        yield f"preset {name}", lambda name=name: run(MemoryLayer.preset(name, 6), torch.randn(3, 2, 6))
    for batch in (1, 16):
        yield f"MANN {batch}", lambda batch=batch: run(MANN(405, 5), torch.randn(50, batch, 405))


def record(file: str) -> None:
    """Run every case of the package that Python finds, on its kernels and on its reference, and save all results."""
    import mann_fast

    found: dict[str, list[torch.Tensor | None]] = {}
    for backend in ("cpp", "reference"):
        with mann_fast.backend(backend):
            for name, case in itertools.chain(op_cases(), layer_cases()):
                torch.manual_seed(0)
                results = case()
                found[f"{backend}: {name}"] = [None if x is None else x.detach().clone() for x in results]
    torch.save({"from": mann_fast.__file__, "found": found}, file)


def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
        and torch.equal(x.isnan(), y.isnan())
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="COMMIT", help="what to compare with")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in both (default: 1)")
    parser.add_argument(
        "--record", metavar="FILE", help=argparse.SUPPRESS
    )  # in the processes of this program
    args = parser.parse_args()
    if args.record:
        torch.set_num_threads(args.threads)
        record(args.record)
        return 0
    if not args.base:
        parser.error("--base COMMIT is needed")
    sys.path.insert(0, str(ROOT))
    from mann_fast.benchmark.base import build

    trees = {"this checkout": ROOT, args.base: build(args.base)}
    recorded = []
    with tempfile.TemporaryDirectory() as folder:
        for number, tree in enumerate(trees.values()):
            file = f"{folder}/{number}.pt"
            command = [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                "--record",
                file,
                "--threads",
                str(args.threads),
            ]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            subprocess.run(command, env=environment, cwd=folder, check=True)
            recorded.append(torch.load(file))
            if not Path(recorded[-1]["from"]).is_relative_to(tree):
                raise SystemExit(f"mann_fast came from {recorded[-1]['from']}, not from {tree}")
    ours, theirs = (one["found"] for one in recorded)
    differing, count = sorted(set(ours) ^ set(theirs)), 0
    for name in ours:
        pairs = list(zip(ours[name], theirs.get(name, ()), strict=False))
        count += len(pairs)
        wrong = [i for i, (x, y) in enumerate(pairs) if not same(x, y)]
        if wrong or len(ours[name]) != len(theirs.get(name, ())):
            differing.append(f"{name}: results {wrong}")
    for line in differing[:20]:
        print(line)
    print(
        f"{len(ours)} cases, {count} tensors: {'the same bits' if not differing else f'{len(differing)} cases differ'}"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

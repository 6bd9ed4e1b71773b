"""Compares outputs and gradients of every op and layer option with another commit's, bit for bit, on the CPU.

    python scripts/same_bits.py --base COMMIT [--threads N]

For a change that is to leave every result as it was. Raw ops have the inputs that tests/test_contract.py draws from the
declarations, public functions those of tests/fuzz_cases.py; layers all options of all memories, their own, and the presets,
each with and without resets and lengths. What the other commit cannot run is told as new. It is built under build/base, as for
`mann-fast bench --base`. Exit status 1 if a bit differs, a result of the other commit is gone, or a case fails here.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import pickle
import subprocess
import sys
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parent.parent
FUZZ = 600  # random calls of public functions: some 50 of each family
SMALL = {"num_slots": 9, "slot_size": 5, "num_heads": 3}
# Whole vectors of every instruction set, and a rest; and many slots.
WIDE = {"num_slots": 40, "slot_size": 17, "num_heads": 2}
WIDE_AXES = {"T": 9, "B": 5, "N": 40, "D": 17, "R": 4, "K": 6, "W": 2, "2S+1": 5, "H": 33}
WIDE_AXES |= {"R+W": 6, "2R": 8, "RD": 68}
LONG_AXES = {**WIDE_AXES, "T": 2, "B": 2, "N": 3000}
# What an option of this name, or else of this type, may be.
OTHERS = {
    **{bool: (False, True), int: (2,), float: (0.01,)},
    **{"sharpness": ("learned", None, 2.5), "write_vector": ("separate", "key"), "clip": (None, 0.1)},
    **{"order": ("write_first", "read_first"), "write_target": ("per_head", "shared")},
    **{"controller": ("lstm", "gru", "feedforward"), "memory_start": ("constant", "learned")},
    "output_size": (None, 4),
}
NO_OPTIONS = ("input_size", "hidden_size", "addressing", "device", "dtype", "options")

# "what: which of it", a backend, and a function without arguments that gives tensors by name.
Case = tuple[str, str, Any]

# What both processes compute.


def named(tree: Any) -> dict[str, torch.Tensor]:
    paths = pytree.tree_flatten_with_path(tree)[0]
    return {pytree.keystr(path): x for path, x in paths if isinstance(x, torch.Tensor)}


def with_gradients(results: Any, leaves: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The tensors of the results, and the gradients of a fixed random functional of all, and of the first alone: kernels leave
    work out for those that have none."""
    found, losses = named(results), []
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    for name in [name for name, x in found.items() if x.requires_grad]:
        noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # whatever other results there are
        x = found[name].double()
        losses.append((x * torch.randn(x.shape, generator=noise, dtype=x.dtype)).sum())
    for of, loss in (("all", losses), ("the first", losses[:1])) if losses else ():
        got = torch.autograd.grad(sum(loss), [*leaves.values()], allow_unused=True, retain_graph=True)
        found |= {f"gradient of {of} by {name}": x for name, x in zip(leaves, got, strict=True)}
    return found


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def raw(name: str, told: dict[str, Any]) -> dict[str, Any]:
    """told: what is not as by default. Not compared is what is kept for backward, some of which nobody writes."""
    from mann_fast.ops._register import OPS

    values = {x.name: getattr(x, "default", None) for x in (*OPS[name].arguments, *OPS[name].options)}
    if unknown := told.keys() - values.keys():
        raise TypeError(f"{name} takes no {', '.join(sorted(unknown))}")
    values |= pytree.tree_map_only(torch.Tensor, leaf, told)
    results = getattr(torch.ops.mann_fast, name).default(*values.values())
    pairs = zip(OPS[name].outputs, results if isinstance(results, tuple) else (results,), strict=True)
    return with_gradients({x.name: y for x, y in pairs if not x.kept}, named(values))


def public(function: str, *given: Any) -> dict[str, Any]:
    from mann_fast import ops

    args, kwargs = given = pytree.tree_map_only(torch.Tensor, leaf, given)
    return with_gradients(getattr(ops, function)(*args, **kwargs), named(given))


def module(make: str, args: Any, options: Any, calls: Any, autocast: bool) -> dict[str, Any]:
    """A new module's parameters, and what it gives, every second call from the state of the one before."""
    import mann_fast

    made = attrgetter(make)(mann_fast)(*args, **options)
    leaves, state = dict(made.named_parameters()), None
    found: dict[str, Any] = dict(leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for i, (x, given) in enumerate(calls):
            leaves["x"] = (x.data if isinstance(x, PackedSequence) else x).requires_grad_()
            results = made(x, state if i % 2 else None, **given)
            found |= {f"call {i} {name}": y for name, y in with_gradients(results, leaves).items()}
            state = results[1]
        with torch.no_grad():  # has a shorter way through Python
            return found | {f"rollout {name}": y for name, y in named(made(x, state)).items()}


def bits(x: torch.Tensor | None) -> Any:
    if x is None:
        return None
    flat = x.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return x.dtype, x.shape, bytes(flat.view(torch.uint8).numpy())


def run(case: bytes) -> dict[str, Any] | str:
    """The bits of all results by name, or why there are none."""
    import mann_fast

    torch.manual_seed(0)
    try:
        _, backend, compute = pickle.loads(case)
        with mann_fast.backend(backend):
            return {name: bits(x) for name, x in compute().items()}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def serve() -> None:
    """What the process of the other commit does, until there is no case any more."""
    import mann_fast

    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    answer: Any = mann_fast.__file__
    while answer:
        pickle.dump(answer, answers)
        answers.flush()
        case = pickle.load(sys.stdin.buffer)
        answer = case and run(case)


# What this process draws, for both.


def op_cases() -> Iterator[Case]:
    import test_contract

    from mann_fast.ops._register import OPS

    narrower = {torch.float64: torch.float32, torch.bfloat16: torch.float16}
    sizes = {"small": {}, "wide": WIDE_AXES, "long": LONG_AXES}
    for size, op in itertools.product(sizes, OPS.values()):
        if size == "long" and any(x.names.count("N") > 1 for x in op.arguments):
            continue  # N^2 numbers are too many
        test_contract.SIZES.update(sizes[size])
        torch.manual_seed(0)
        for i, values in enumerate(test_contract.variants(op)):
            plain = [None] * len(op.arguments) + [x.default for x in op.options]
            both = zip(op.names, values, plain, strict=True)
            told = {name: x for name, x, default in both if isinstance(x, torch.Tensor) or x != default}
            name = f"raw op {op.name}: {size} {i}"
            yield name, "auto", partial(raw, op.name, told)
            told = pytree.tree_map_only(torch.Tensor, lambda x: x.to(narrower.get(x.dtype, x.dtype)), told)
            yield f"{name} narrower", "auto", partial(raw, op.name, told)


def public_cases() -> Iterator[Case]:
    import fuzz_cases
    import test_contract

    torch.manual_seed(0)
    recorder = test_contract.ops = MagicMock()  # is called in the place of the functions
    every = [("plain", call) for call in test_contract.public_calls().values()]
    for number in range(FUZZ):
        drawn = fuzz_cases.FAMILIES[(case := fuzz_cases.Case(number)).family](case)
        every.append((f"as tests/fuzz.py --seed {number}", partial(drawn.call, recorder, drawn.tensors)))
    for name, call in every:
        recorder.reset_mock()
        with suppress(ValueError):  # it has no results to unpack
            call()
        [(function, args, kwargs)] = recorder.method_calls
        for backend in ("cpp", "reference"):
            yield f"ops.{function}: {name}", backend, partial(public, function, args, kwargs)


def layer(make, args, options, how="", width=6, steps=5, batch=3, backends=("cpp", "reference")):
    torch.manual_seed(0)
    both, calls = {"resets", "lengths"}, []
    for names in (set(), both, {"resets"}, {"lengths"}, both | {"return_weights"}):
        x = torch.randn(steps, batch, width).to(options.get("dtype", torch.float32))
        resets, lengths = torch.rand(steps, batch) < 0.3, torch.randint(0, steps + 1, (batch,))
        if "batch_first" in options:
            x, resets = x.transpose(0, 1), resets.t()
        elif how == "unbatched":
            x, resets, lengths = x[:, 0].clone(), resets[:, 0], lengths[0]
        elif how == "packed":  # which has its lengths
            x, names = pack_padded_sequence(x, lengths.clamp(1), enforce_sorted=False), names - both
        given = {"resets": resets, "lengths": lengths, "return_weights": True}
        if make != "MANN" or "return_weights" not in names:
            calls.append((x, {name: given[name] for name in names}))
    for backend in backends:
        case = partial(module, make, args, options, calls, how == "autocast")
        yield f"{make} {options.get('addressing', args[0])}: {args} {options} {how}", backend, case


def others(name: str, default: Any) -> list[Any]:
    """What an option may be instead of its default; a KeyError where OTHERS has to be told."""
    return [x for x in OTHERS[name if name in OTHERS else type(default)] if x != default]


def layer_cases() -> Iterator[Case]:
    from mann_fast import MemoryLayer, MemoryStack
    from mann_fast.layers.registry import MEMORIES, PRESETS, options_of

    kinds = [{"controller": x} for x in others("controller", "lstm")]
    kinds += [{"dtype": x} for x in (torch.float64, torch.bfloat16, torch.float16)]
    for addressing, memory in MEMORIES.items():
        small = {"addressing": addressing, **SMALL}
        defaults = {name: x for name, x in options_of(memory).items() if name not in SMALL}
        untried = {(name, x) for name, default in defaults.items() for x in others(name, default)}
        for chosen in itertools.product(*([x, *others(name, x)] for name, x in defaults.items())):
            own = {name: x for name, x in zip(defaults, chosen, strict=True) if x != defaults[name]}
            try:
                memory(**SMALL, **own)
            except ValueError:  # an option that goes with another alone
                continue
            untried -= own.items()
            yield from layer("MemoryLayer", (6, 7), small | own)
            for kind in kinds:
                yield from layer("MemoryLayer", (6, 7), small | own | kind, backends=("cpp",))
            if len(own) < 2:
                yield from layer("MemoryLayer", (6, 33), small | own | WIDE, steps=12, batch=17)
                for how in ("unbatched", "packed", "autocast"):
                    yield from layer("MemoryLayer", (6, 7), small | own, how)
        if untried:
            raise SystemExit(f"{addressing} refuses {untried}: OTHERS has to say what it may be")
        for make, more in ((MemoryLayer, {}), (MemoryStack, {"num_layers": 2})):
            for x in inspect.signature(make).parameters.values():
                for value in () if x.name in NO_OPTIONS else others(x.name, x.default):
                    yield from layer(make.__name__, (6, 7), small | more | {x.name: value})
        yield from layer("MANN", (405, 5), {"addressing": addressing}, width=405, steps=20)
    for name in PRESETS:
        yield from layer("MemoryLayer.preset", (name, 6), {})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="COMMIT", help="what to compare with")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in both (default: 1)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # in the other process
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.serve:
        serve()
        return 0
    if not args.base:
        parser.error("--base COMMIT is needed")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import mann_fast
    from mann_fast.benchmark.base import build

    tree = build(args.base)
    command = [sys.executable, __file__, "--serve", "--threads", str(args.threads)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    differing, new, compared, tensors = defaultdict(list), defaultdict(list), 0, 0
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tree)}, cwd=tree, **pipes) as other:
        for file, expected in ((mann_fast.__file__, ROOT), (pickle.load(other.stdout), tree)):
            if not Path(file).is_relative_to(expected):
                raise SystemExit(f"mann_fast came from {file}, not from {expected}")
        for case in itertools.chain(op_cases(), public_cases(), layer_cases()):
            data, (what, which) = pickle.dumps(case), case[0].split(": ", 1)
            pickle.dump(data, other.stdin)
            other.stdin.flush()
            theirs, ours = pickle.load(other.stdout), run(data)
            if isinstance(ours, str):
                differing[what, case[1]].append(f"{which}: here {ours}")
            elif isinstance(theirs, str):
                new[theirs].append(case[0])
            else:
                compared, tensors = compared + 1, tensors + len(theirs)
                for x in ours.keys() - theirs.keys():
                    new[f"no result {x}"].append(case[0])
                if wrong := [x for x in theirs if x not in ours or ours[x] != theirs[x]]:
                    differing[what, case[1]].append(f"{which}: {wrong[0]}, one of {len(wrong)} results")
        pickle.dump(b"", other.stdin)
    for reason, names in new.items():
        print(f"new in {len(names)} cases, the first {names[0]}: there {reason}")
    for (what, backend), cases in differing.items():
        print(f"{what} ({backend}): {len(cases)} cases differ, the first {cases[0]}")
    print(f"{compared} cases, {tensors} tensors compared: {'not ' if differing else ''}the same bits")
    return 1 if differing or not compared else 0


if __name__ == "__main__":
    sys.exit(main())

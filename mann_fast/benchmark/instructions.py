"""Instructions per call, counted by callgrind: unlike a time they repeat, on however busy a machine."""

from __future__ import annotations

import shutil

from .cases import OURS, Shape

CALLS = 3


def count(op: str, direction: str, shape: Shape, dtype: str, backend: str) -> int:
    """Instructions of one call of ours on one thread, after a first one, interpreter included; takes about a minute.

    Callgrind knows no AVX-512: kernels run as on a processor with AVX2. Raises ValueError where valgrind is not installed.
    """
    from torch.utils.benchmark import Timer

    if shutil.which("valgrind") is None:
        raise ValueError("--instructions needs valgrind; on Debian: apt install valgrind")
    setup = f"""
import torch
from mann_fast import backend
from mann_fast.benchmark.cases import Shape, cases
torch.manual_seed(0)
chosen = backend({backend!r})  # kept, or it would end at once
chosen.__enter__()
(case,) = cases({op!r}, Shape.parse({str(shape)!r}.replace(" ", ",")), torch.{dtype}, ({direction!r},))
call = case.calls[{OURS!r}]
call()
"""
    counted = Timer("call()", setup=setup, num_threads=1).collect_callgrind(CALLS, collect_baseline=False)
    return counted.counts() // CALLS

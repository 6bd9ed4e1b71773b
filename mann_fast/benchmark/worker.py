"""The kernels of one commit in a process of their own, measured by the benchmark of this file's commit.

    python worker.py TREE seconds REQUESTS         one request; base.py is on the other side
    python worker.py TREE instructions REQUESTS    under callgrind; instructions.py is on the other side

TREE is a built checkout and REQUESTS a JSON list of objects of op, direction, shape, dtype, device, backend and threads.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WARM = 8  # calls before those that are counted: the interpreter rewrites what it runs for what it meets
CALLS = 5


def benchmark_of_this_commit() -> None:
    """Let mann_fast.benchmark be this folder, on the ops of the package that was imported."""
    folder = Path(__file__).resolve().parent
    name = "mann_fast.benchmark"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def case_of(request: dict[str, Any]) -> Any:
    import torch

    from mann_fast.benchmark.cases import Shape, cases

    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    shape = Shape.parse(request["shape"].replace(" ", ","))
    dtype, directions = getattr(torch, request["dtype"]), (request["direction"],)
    (case,) = cases(request["op"], shape, dtype, directions, device=request["device"])
    return case


def seconds(requests: list[dict[str, Any]]) -> None:
    """Says {"verified": ..., "seconds": ...} of a first call; then, for each line N on stdin, how many seconds N calls took."""
    import torch

    from mann_fast.benchmark.cases import OURS
    from mann_fast.benchmark.measure import verify

    (request,) = requests
    case = case_of(request)
    verified = verify(case)[OURS]["verified"]
    call = case.calls[OURS]

    def of(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            call()
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    print(json.dumps({"verified": verified, "seconds": min(of(1) for _ in range(3))}), flush=True)
    for line in sys.stdin:
        print(of(int(line)), flush=True)


def instructions(requests: list[dict[str, Any]]) -> None:
    """Has callgrind dump what it counts of each of CALLS calls of each request, and says a list: of each request None, or why
    it cannot be called. Callgrind only looks on once all is ready, which takes a sixth of the time."""
    import torch
    import torch._dynamo  # as optimizers do, after which a call of any op takes some 14,000 instructions more

    from mann_fast.benchmark.cases import OURS

    calls, reasons = [], []
    for request in requests:
        try:
            call = case_of(request).calls[OURS]
            call()
        except Exception as error:  # a commit from before this op, or whatever was wrong with it there
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            reasons.append(None)
            calls.append(call)
    gc.disable()
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, capture_output=True)
    for call in calls:
        for _ in range(WARM):
            call()
        for _ in range(CALLS):
            torch._C._valgrind_toggle()
            call()
            torch._C._valgrind_toggle_and_dump_stats()
    print(json.dumps(reasons))


def main(tree: str, measure: str, requests: list[dict[str, Any]]) -> None:
    import mann_fast

    if not Path(mann_fast.__file__).is_relative_to(tree):
        raise ImportError(f"mann_fast comes from {mann_fast.__file__}, not from {tree}")
    if mann_fast.backends()["cpp"]:
        raise ImportError(f"the kernels in {tree} cannot run: {mann_fast.backends()['cpp']}")
    benchmark_of_this_commit()
    with mann_fast.backend(requests[0]["backend"]):
        {"seconds": seconds, "instructions": instructions}[measure](requests)


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]  # this folder's names are no top-level modules
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))

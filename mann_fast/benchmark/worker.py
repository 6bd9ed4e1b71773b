"""The kernels of one commit in a process of their own, measured by the benchmark of this file's commit.

python worker.py TREE REQUEST, where TREE is a built checkout and REQUEST a JSON object of op, direction, shape, dtype, device,
backend and threads. Says {"verified": ..., "seconds": ...} of a first call; then, for each line N on stdin, how many
seconds N calls took. base.py is on the other side.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path


def benchmark_of_this_commit() -> None:
    """Let mann_fast.benchmark be this folder, on the ops of the package that was imported."""
    folder = Path(__file__).resolve().parent
    name = "mann_fast.benchmark"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def main(tree: str, request: dict[str, str]) -> None:
    import torch

    import mann_fast

    if not Path(mann_fast.__file__).is_relative_to(tree):
        raise ImportError(f"mann_fast comes from {mann_fast.__file__}, not from {tree}")
    if mann_fast.backends()["cpp"]:
        raise ImportError(f"the kernels in {tree} cannot run: {mann_fast.backends()['cpp']}")
    benchmark_of_this_commit()
    from mann_fast.benchmark.cases import OURS, Shape, cases
    from mann_fast.benchmark.measure import verify

    torch.set_num_threads(int(request["threads"]))
    torch.manual_seed(0)
    shape = Shape.parse(request["shape"].replace(" ", ","))
    with mann_fast.backend(request["backend"]):
        (case,) = cases(
            request["op"],
            shape,
            getattr(torch, request["dtype"]),
            (request["direction"],),
            device=request["device"],
        )
        verified = verify(case)[OURS]["verified"]
        call = case.calls[OURS]

        def seconds(times: int) -> float:
            begin = time.perf_counter()
            for _ in range(times):
                call()
            if case.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        print(json.dumps({"verified": verified, "seconds": min(seconds(1) for _ in range(3))}), flush=True)
        for line in sys.stdin:
            print(seconds(int(line)), flush=True)


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]  # this folder's names are no top-level modules
    main(sys.argv[1], json.loads(sys.argv[2]))

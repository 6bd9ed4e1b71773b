"""Runs tests once for each instruction set that the extension was built for and this processor has.

    python scripts/test_isas.py tests/test_lrua.py ...     (arguments for pytest)

Memory that nobody has written yet is NaN in these runs, in torch and in the kernels, so that whatever reads
it shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRY = "import torch, mann_fast\nwith mann_fast.backend('cpp'): mann_fast.ops.least_used(torch.rand(1, 3), 1)"


def main(arguments: list[str]) -> int:
    info = json.loads((ROOT / "mann_fast" / "_build_info.json").read_text())
    if not info["extension"]:
        print(f"there is no extension to test: {info['reason']}", file=sys.stderr)
        return 1
    environments, failed = {}, []
    for isa in info["isas"]:
        env = {**os.environ, "MANN_FAST_CPU_ISA": isa, "MANN_FAST_POISON": "1"}
        trial = subprocess.run([sys.executable, "-c", TRY], env=env, cwd=ROOT, capture_output=True, text=True)
        if "MANN_FAST_CPU_ISA names an instruction set" in trial.stderr:
            print(f"{isa}: SKIPPED, this processor does not have it", flush=True)
        elif trial.returncode != 0:
            print(trial.stderr, file=sys.stderr)
            failed.append(isa)
        else:
            environments[isa] = env
    for isa, env in environments.items():
        print(f"{isa}:", flush=True)
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], env=env, cwd=ROOT)
        failed += [isa] if tests.returncode != 0 else []
    if failed:
        print(f"failed on {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

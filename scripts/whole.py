"""Says which targets of `make check` are due to run whole: those of which a file has changed since `make nightly` last passed.

    python scripts/whole.py                 their names, for make check WHOLE="..."
    python scripts/whole.py --passed        make nightly passed on what is committed: remember that

The commit is in .ci/nightly. Where the history does not reach back to it, it says so, and names none.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED = ROOT / ".ci" / "nightly"
# All code that runs on a GPU. The arguments of kernels, the rest of csrc/include/, are right or wrong in any case of any.
CUDA = ("csrc/cuda/", "csrc/include/half.h")
# What a target shows, or a part of it, by the files that can break it.
FILES = {
    "isas": ("csrc/cpu/", "csrc/include/"),
    "cuda": CUDA,
    "emulate": (*CUDA, "tests/cpp/emulation.h"),
    "triton": ("kernels/",),
    "sanitize-cpu": ("csrc/cpu/", "csrc/include/"),
    "sanitize-cuda": (*CUDA, "tests/cpp/emulation.h", "tests/cpp/left_out.cpp"),
    "wheel": ("setup.py", "pyproject.toml", "MANIFEST.in", "scripts/build_backend.py", "scripts/native.py"),
}


def git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def main(arguments: list[str]) -> int:
    if arguments == ["--passed"]:
        PASSED.write_text(
            git("rev-parse", "HEAD") or sys.exit("make nightly is remembered in a git checkout only")
        )
        return 0
    changed = git("diff", "--name-only", PASSED.read_text().strip()) if PASSED.exists() else None
    if changed is None:
        print(
            f"no history back to the commit in {PASSED.relative_to(ROOT)}: nobody knows what is due",
            file=sys.stderr,
        )
        return 0
    names = changed.split()
    print(*(target for target, files in FILES.items() if any(name.startswith(files) for name in names)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

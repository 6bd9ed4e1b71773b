"""Installs a wheel in empty virtual environments, each with a torch of its own, and runs tests there.

    python scripts/test_wheel.py dist/*.whl --torch torch==2.13.0 --torch torch==2.14.1 tests/test_lrua.py

The tests are copied to a temporary folder, so that they see the installed package and nothing of this
source tree. At least one torch must differ from the one that the wheel was built with. They run on the baseline's kernels, the
farthest from those that make test ran on, with memory that nobody has written filled with NaN.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKED = ("tests/test_packaging.py", "tests/test_content.py", "tests/test_pretrained.py")
PROBE = """
import json, pathlib, torch, mann_fast
folder = pathlib.Path(mann_fast.__file__).parent
info = json.loads((folder / "_build_info.json").read_text())
cpp = mann_fast.backends()["cpp"]
print(json.dumps({"folder": str(folder), "torch": torch.__version__, "built": info["torch"], "cpp": cpp}))
"""


def test_beside(torch: str, wheel: Path, tests: list[str], folder: Path, whole: bool) -> bool:
    """Run the tests in a new environment in the folder, or unless ``whole`` those that can fail only there; returns whether
    its torch is not the wheel's.

    Raises subprocess.CalledProcessError or SystemExit if something fails.
    """
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    python = folder / "venv" / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    tested = {**env, "MANN_FAST_CPU_ISA": "baseline", "MANN_FAST_POISON": "1"}

    def run(*command: str, env: dict[str, str] = env, **options) -> subprocess.CompletedProcess:
        return subprocess.run([str(python), *command], cwd=folder, env=env, check=True, **options)

    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    run("-m", "pip", "install", "--quiet", *shlex.split(torch))
    run("-m", "pip", "install", "--quiet", f"{wheel}[test]")
    found = json.loads(run("-c", PROBE, stdout=subprocess.PIPE, text=True).stdout)
    print(f"wheel built with torch {found['built']}, beside torch {found['torch']}:", flush=True)
    if not found["folder"].startswith(str(folder / "venv")):
        raise SystemExit(f"the tests would use {found['folder']}, not the wheel")
    if found["cpp"] is not None:
        raise SystemExit(f"the wheel's extension cannot be used: {found['cpp']}")
    run(str(python.with_name("mann-fast")), "doctor")
    other = found["torch"] != found["built"]
    if other or whole:
        run(
            "-m",
            "pytest",
            "-q",
            "--numprocesses",
            "2",
            *([] if whole else ["-m", "not thorough"]),
            *tests,
            env=tested,
        )
    else:  # the torch and, byte for byte, the extension of make test: whether all that belongs to it was packed is left
        run("-m", "pytest", "-q", *PACKED, env=tested)
    return other


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--whole", action="store_true", help="leave out no test")
    parser.add_argument(
        "--torch", action="append", required=True, help="what pip installs for torch; may be repeated"
    )
    args = parser.parse_args()
    others = 0
    (ROOT / "build").mkdir(exist_ok=True)
    for torch in args.torch:
        # Not in the system's temporary folder: a torch with CUDA takes more than 5 GB.
        with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="wheel-") as folder:
            try:
                others += test_beside(torch, args.wheel.resolve(), args.tests, Path(folder), args.whole)
            except subprocess.CalledProcessError as problem:
                print(f"beside {torch}: {problem}", file=sys.stderr)
                return 1
    if not others:
        print("no torch was another than the one that the wheel was built with", file=sys.stderr)
    return 0 if others else 1


if __name__ == "__main__":
    sys.exit(main())

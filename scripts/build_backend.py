"""setuptools as the build backend, with one addition: a torch that is installed already serves for the build.

The extension is built against the headers of torch, any version from 2.11 on, and runs beside any other. To
list torch in pyproject.toml would make pip fetch one more copy, of several gigabytes, into the isolated
environment in which it builds. So torch is asked for only if none is found, and not at all where no
extension can be built.
"""

from __future__ import annotations

import re
import site
import sys
import sysconfig
from pathlib import Path

from native import OLDEST_TORCH, CannotBuild, Compiler
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are


def torch_version(folder: Path) -> str | None:
    """The version of the torch in this folder; None if there is none."""
    try:
        found = re.search(
            r"^__version__ = ['\"](.+?)['\"]", (folder / "version.py").read_text(), re.MULTILINE
        )
    except OSError:
        return None
    return found.group(1) if found else None


def find_torch() -> Path | None:
    """The folder of an installed torch that is new enough to build with, None if there is none.

    In pip's isolated environment sys.path hides the environment that pip installs into; sysconfig still
    names it.
    """
    places = [*sys.path, sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        places.append(site.getusersitepackages())
    for place in places:
        folder = Path(place) / "torch"
        version = torch_version(folder)
        if version and tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= OLDEST_TORCH:
            if (folder / "include/torch/csrc/stable/library.h").exists():
                return folder
    return None


def _torch_requirement() -> list[str]:
    if sys.platform != "linux" or find_torch():
        return []
    try:
        Compiler()
    except CannotBuild:
        return []
    return ["torch>=" + ".".join(map(str, OLDEST_TORCH))]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()

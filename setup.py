"""Builds mann_fast/_C.abi3.so from csrc/; everything else about the package is in pyproject.toml.

The kernels are compiled once per instruction set and know nothing of torch; csrc/bindings.cpp uses
LibTorch's stable ABI only, so the library needs nothing of the very torch that it was built with. It has no
Python module inside: torch.ops.load_library loads it. Objects are kept in build/objects for the next time, and may come
from another build's (MANN_FAST_OBJECTS, see native.Compiler.compile).
Where there are nvcc and a GPU, the CUDA kernels come with it, in a library of their own that torch without CUDA need not
load; native.cuda_architectures says how to ask for them elsewhere. MANN_FAST_VERBOSE=1 shows the compilers' commands.

Where either cannot be built the package installs all the same and runs on what there is;
mann_fast/_build_info.json says why (`mann-fast doctor` shows it). MANN_FAST_REQUIRE_EXTENSION=1 makes the
first an error.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))
from build_backend import find_torch, torch_version  # noqa: E402
from native import (
    OLDEST_TORCH,
    ROOT,
    CannotBuild,
    Compiler,
    Nvcc,
    Unit,
    binding_flags,
    chosen_isas,
    cuda_architectures,
)  # noqa: E402

OBJECTS = Path("build/objects")
LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_C_cuda.abi3.so"
BUILD_INFO = "_build_info.json"


def build_library(target: Path) -> dict:
    """Build the extension; returns what it was built with. Raises CannotBuild."""
    if sys.platform != "linux":
        raise CannotBuild(f"the C++ extension is built on Linux only, this is {sys.platform}")
    compiler = Compiler()
    torch = find_torch()
    if torch is None:
        raise CannotBuild(
            f"no torch >= {'.'.join(map(str, OLDEST_TORCH))} with C++ headers was found to build with"
        )
    bindings = Unit("csrc/bindings.cpp", "bindings", binding_flags(torch))
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    isas = chosen_isas(compiler.isas)
    objects = compiler.compile([*compiler.kernel_units(isas), bindings], OBJECTS, flags)
    # libstdc++ first: libtorch_cpu.so has copies of some of its symbols. No search path is recorded, since
    # whoever loads the library has imported torch.
    libraries = ["-Wl,--as-needed", "-lstdc++", f"-L{torch}/lib", "-ltorch_cpu"]
    compiler.link(target, objects, [*libraries, *flags], OBJECTS)
    return {"torch": torch_version(torch), "compiler": compiler.version, "isas": isas}


def build_cuda_library(target: Path) -> dict:
    """Build the CUDA kernels; returns what they were built with. Raises CannotBuild."""
    nvcc, compiler, torch = Nvcc(cuda_architectures()), Compiler(), find_torch()
    bindings = Unit("csrc/cuda/bindings.cpp", "cuda_bindings", binding_flags(torch))
    objects = nvcc.compile(nvcc.kernel_units(), OBJECTS) + compiler.compile([bindings], OBJECTS)
    # What gives the current stream is in libtorch_cuda, which a torch without CUDA does not have: a stand-in of the same
    # name will do to build with, since whoever loads the library has torch's own.
    stand_in = OBJECTS / "stand_in" / "libtorch_cuda.so"
    if not stand_in.exists():
        stand_in.parent.mkdir(exist_ok=True)
        source = stand_in.with_suffix(".c")
        source.write_text(
            "int aoti_torch_get_current_cuda_stream(int index, void** stream) { return index && stream; }\n"
        )
        compiler.run(
            ["-shared", "-fPIC", "-x", "c", str(source), "-Wl,-soname,libtorch_cuda.so", "-o", str(stand_in)]
        )
    libraries = [f"-L{torch}/lib", "-ltorch_cpu", str(stand_in), "-Xlinker", "--exclude-libs,ALL"]
    nvcc.link(target, objects, ["-cudart", "static", *libraries], OBJECTS)
    return {"cuda": nvcc.version, "architectures": nvcc.architectures}


class BuildPython(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # what an earlier build left behind must not get into this one's wheel
            shutil.rmtree(Path(self.build_lib) / "mann_fast", ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split(".")).with_name(LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        info = {"extension": True, "reason": None, "torch": None, "compiler": None, "isas": []}
        try:
            info.update(build_library(library))
        except CannotBuild as problem:
            if os.environ.get("MANN_FAST_REQUIRE_EXTENSION") == "1":
                raise SystemExit(f"mann_fast: {problem}") from None
            library.unlink(missing_ok=True)
            info.update(extension=False, reason=str(problem))
            print(f"mann_fast is built without its C++ extension: {problem}", file=sys.stderr)
        cuda = library.with_name(CUDA_LIBRARY)
        info.update(cuda=None, cuda_reason="the C++ extension comes first", architectures=[])
        if info["extension"]:
            try:
                info.update(build_cuda_library(cuda), cuda_reason=None)
            except CannotBuild as problem:
                cuda.unlink(missing_ok=True)
                info["cuda_reason"] = str(problem)
                print(f"mann_fast is built without its CUDA kernels: {problem}", file=sys.stderr)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.with_name(BUILD_INFO).write_text(json.dumps(info, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For editable installs. Replaced, not written over: a running process may have the library open."""
        built, package = Path(self.build_lib) / "mann_fast", ROOT / "mann_fast"
        for name in (LIBRARY, CUDA_LIBRARY, BUILD_INFO):
            if (built / name).exists():
                shutil.copy2(built / name, package / f"{name}.new")
                os.replace(package / f"{name}.new", package / name)
            else:
                (package / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "mann_fast"
        return [
            str(package / name) for name in (LIBRARY, CUDA_LIBRARY, BUILD_INFO) if (package / name).exists()
        ]


# Free-threaded Python has no stable ABI, so its wheels are tagged for one Python version.
abi3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
setup(
    ext_modules=[Extension("mann_fast._C", ["csrc/bindings.cpp"], py_limited_api=abi3, optional=True)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if abi3 else {},
)

"""Settings for all tests. With MANN_FAST_POISON set, memory that nobody has written yet is NaN, in torch and in the kernels."""

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import mann_fast

# A busy machine is slow, and no test may fail for that.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")


@pytest.fixture(autouse=True)
def poisoned_memory():
    if not os.environ.get("MANN_FAST_POISON"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def tested_backend():
    """The kernels that MANN_FAST_TEST_BACKEND names serve every op, or the test fails; tensors are made on
    MANN_FAST_TEST_DEVICE."""
    named = os.environ.get("MANN_FAST_TEST_DEVICE")
    device = torch.device(named) if named else nullcontext()
    with mann_fast.backend(os.environ.get("MANN_FAST_TEST_BACKEND", "auto")), device:
        yield


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """Triton's interpreter computes in NumPy, which warns of what is meant to give NaN or infinity."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter puts its functions into triton.language anew at every call of a device function, more than half of
    its time, though what the launch of the kernel has put there stays until it returns."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    launch, patched = interpreter.GridExecutor.__call__, set()

    @torch.compiler.disable  # Dynamo follows NumPy, and so this deep into an op where a compiled call is transformed
    def launch_anew(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    def call(self, *arguments, **options):
        languages = frozenset(id(x) for x in self.fn.__globals__.values() if x is tl or x is tl.core)
        if languages not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(languages)
        return self.rewrite()(*arguments, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

"""A process that trains keeps the memory that its tensors give back."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

FAULTS = """\
import resource, torch
from mann_fast.training.heap import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    keep_freed_memory()
for _ in range(4):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_pages_are_not_mapped_again_for_every_tensor():
    again, kept = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(keep=keep)], text=True))
        for keep in (False, True)
    )
    # 2**24 numbers are 16,384 pages of 4 KiB; where the kernel gives huge ones, 32.
    assert again >= 8 * 32
    assert kept < 8

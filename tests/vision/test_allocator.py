import platform
import subprocess
import sys

import pytest

# A large tensor made again and again: fresh pages are faults. In a process of its own, which it changes for good.
SCRIPT = """
import resource, torch
import fastshap_vision as fv

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
default = faults()
assert fv.keep_freed_memory()
faults()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    printed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    default, kept = map(int, printed.split())
    assert default > 5 * 2**26 // 2**21  # at least a fault for each huge page
    assert kept < default / 10

"""What a run is built from: here, that the memory of a step stays for the next one."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pact_fast.train.build import base_out_of_place

# In a process of its own: what other tests have freed counts towards glibc's limit, too.
PAGE_FAULTS = """
import resource, torch
from pact_fast.train.build import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(32)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
for _ in range(3):  # the first rounds may still grow the heap
    faults = page_faults()
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_not_faulted_in_again():
    """Page faults of taking, writing and freeing 128 MiB, 32,768 pages of 4 KiB, once the heap has grown."""
    command, root = [sys.executable, "-c", PAGE_FAULTS], Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4000


def test_the_bundled_model_out_of_its_environment_is_said():
    assert base_out_of_place("toolbox-base", "toolbox") is None
    assert base_out_of_place("my/model", "python") is None
    assert "knows the toolbox environment alone" in base_out_of_place("toolbox-base", "python")

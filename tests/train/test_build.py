"""What a run is built from: here, that the memory of a step stays for the next one."""

import platform

import pytest
import torch

from pact_fast.malloc import keep_freed_memory

resource = pytest.importorskip("resource")


def page_faults() -> int:
    """Page faults of taking, writing and freeing 128 MiB: 32,768 pages of 4 KiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(32)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_not_faulted_in_again():
    assert keep_freed_memory()
    page_faults()
    assert page_faults() < 4000

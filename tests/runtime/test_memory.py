"""What a process takes of the machine's memory, and what it gives back."""

import platform
import resource
import subprocess
import sys

import pytest
from conftest import REPOSITORY

PROGRAM = """
import resource
import torch
from runtime.processes import start

def pages_taken(blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with start("cpu", "fp32"):
    pages_taken(8)  # malloc's alignment leaves gaps that are a little too small, but not for ever
    print(pages_taken(8))
"""


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="needs glibc 2.35")
def test_a_block_like_one_freed_before_costs_no_new_pages():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, text=True)
    assert int(done.stdout) < (64 << 20) // resource.getpagesize() / 10

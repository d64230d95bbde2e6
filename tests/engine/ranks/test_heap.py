import subprocess
import sys

from engine.ranks.heap import freed_bytes

PROGRAM = """
import resource, sys
import torch
from engine.ranks.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
x = torch.zeros(12 << 20)  # 48 MiB, above what glibc takes from its heap
for _ in range(20):
    (x + 1), (x + 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(choice: str) -> int:
    """Pages that twenty temporaries of 48 MiB have the kernel fill."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_memory_that_was_freed_is_used_again() -> None:
    pages = 20 * (48 << 20) // 4096
    assert faults("leave") > pages / 2  # or there is nothing to mend; huge pages would show here
    assert faults("keep") < pages / 4  # small blocks may take some of a large one's place


def test_what_was_freed_and_kept_is_counted() -> None:
    program = """
import torch
from engine.ranks.heap import freed_bytes, keep_freed_memory
keep_freed_memory()
x = torch.ones(64 << 20)
before = freed_bytes()
del x
print(freed_bytes() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 255 << 20
    assert freed_bytes() >= 0

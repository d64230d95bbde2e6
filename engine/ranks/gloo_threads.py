"""Keeps gloo's threads out of OpenMP.

A group of gloo has two threads, which copy what its collectives bring. torch gives a large copy to
an OpenMP team of the thread that asks for it, as large as the main thread's. libgomp then counts
more threads than cores, and from then on lets those that wait sleep at once: every small parallel
operation of the main thread costs more for as long as the process lives (7 us became 17 on two
cores, benchmarks.small_operations).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

_MESSAGES = 8  # at once: the first keeps one of the two threads waiting, the next wakes the other
# Bytes: torch shares copies of more than 2^15, and in this long the other thread has woken up.
_ELEMENTS = 1 << 20


def keep_out_of_openmp(groups: Iterable[dist.ProcessGroup]) -> None:
    """Let the threads of these groups work alone, from now on; all ranks of them call together.

    torch asks how many threads there are when a thread first has something to share, and keeps the
    answer for that thread: so they are asked while it is 1.
    """
    num_threads = torch.get_num_threads()
    groups = [g for g in groups if g.size() > 1 and dist.get_backend(g) == dist.Backend.GLOO]
    if num_threads == 1 or not groups:
        return
    torch.set_num_threads(1)
    try:
        for group in groups:
            mine = torch.zeros(_ELEMENTS, dtype=torch.uint8)
            messages = []
            for _ in range(_MESSAGES):
                gathered = [torch.empty_like(mine) for _ in range(group.size())]
                messages.append(dist.all_gather(gathered, mine, group=group, async_op=True))
            for message in messages:
                message.wait()
    finally:
        torch.set_num_threads(num_threads)

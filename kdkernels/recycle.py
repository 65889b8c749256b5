"""Large CPU gradients in memory that has been touched before.

A new gradient of a few hundred megabytes is fresh memory in every step: the kernel zeroes each page on first
touch, which can cost more than the loss itself (on a virtual machine, twice as much). PyTorch's CPU allocator
gives freed memory back at once; here the two largest blocks (a student's and a teacher's) are kept, marked
MADV_FREE: the system may take their pages whenever it needs memory, and until it does the next step finds
them.

Such a tensor's storage cannot be resized ("Trying to resize storage that is not resizable"): torch resizes
what it has allocated itself, and from Python it can only be lent memory. `x.grad = None` gives a gradient
back; KDKERNELS_RECYCLE=0 turns all of this off.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

SMALLEST = 8 << 20  # below this, malloc reuses memory by itself often enough
_possible = os.environ.get("KDKERNELS_RECYCLE") != "0" and hasattr(mmap, "MADV_FREE")
_lock = threading.RLock()  # a finalizer may run inside `empty`
_kept: list[mmap.mmap] = []  # the larger one last


def empty(like: Tensor) -> Tensor:
    """A tensor of like's shape, dtype and device, contiguous."""
    size = like.numel() * like.element_size()
    block = _take(size) if size >= SMALLEST and _possible and like.is_cpu else None
    if block is None:  # torch's error where it finds none either
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    view = memoryview(block)  # dies with the tensor's storage
    # the interpreter's end is not the tensor's: others may still read it
    weakref.finalize(view, _release, block).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=size // like.element_size()).view(like.shape)


def clear() -> None:
    """Give the kept blocks back."""
    with _lock:
        _kept.clear()


def _take(size: int) -> mmap.mmap | None:
    """A block of at least this size; None where the system has none, not even for what is kept."""
    with _lock:
        for i, block in enumerate(_kept):
            if size <= len(block):  # pages beyond size stay marked
                found = _kept.pop(i)
                if found is block:
                    return found
                _kept.append(found)  # a finalizer has been here
                break
    for _ in range(2):
        try:
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError):
            clear()
    return None


def _release(block: mmap.mmap) -> None:
    with _lock:
        try:
            block.madvise(mmap.MADV_FREE)
        except OSError:  # memory is locked (mlockall), or the system does not know it: not kept
            return
        _kept.append(block)
        _kept.sort(key=len)
        del _kept[:-2]

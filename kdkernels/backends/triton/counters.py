"""COUNT, with which the programs of a row wait for each other (exchange.py): zeros before `loss_rows`, and
again after `careful_rows`, which sets back what the other has counted. So the zeros of one call serve the
next, and take no launch, a memset, of their own.

A call owns its counters until all of it is launched, so that nobody reads what it has not set back:

    the next call       finds them on the same stream alone, where it begins when this one has ended
    another thread      on this stream finds none meanwhile, and makes its own
    a call that fails   between its launches gives nothing back; after a kernel that does, none runs
    CUDA graphs         run when and where they like: zeros are made, by each replay again
    compilers           let CUDA graphs own all that a step leaves: `Call.keeps` is not set
"""

from __future__ import annotations

import torch
from torch import Tensor

_kept: dict[tuple, Tensor] = {}  # by device and stream


def place(device: torch.device) -> tuple | None:
    """Where the counters of a call are kept, on the device's current stream; None where they cannot be."""
    if device.type == "cpu":  # Triton's interpreter, one launch after another
        return device, 0
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return device, torch._C._cuda_getCurrentRawStream(device.index)
    return None


def take(losses: Tensor, at: tuple | None) -> Tensor:
    """Zeros for the rows of such losses: for each an fp64 number, which the kernels take for two int32."""
    found = None if at is None else _kept.pop(at, None)
    return torch.zeros_like(losses) if found is None or found.numel() < losses.numel() else found


def give(zeros: Tensor, at: tuple | None) -> None:
    """Back, when all is launched after which they are zeros again."""
    if at is not None:
        _kept[at] = zeros

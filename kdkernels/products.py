"""Products of chunks with weights, summed in fp32 at least and written to buffers that are there, whatever
PyTorch has for the dtypes on a device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROUND = 64  # tokens: what matrix products divide well
BLOCK_BYTES = 4 << 20  # of a temporary in `product`


def shaped(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return buffer[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is not None and x.dtype == out.dtype and _has_product(x, out):
        return torch.addmm(bias, x, weight.t(), out=out)
    product(x, weight.t(), out, rounded=out.dtype == x.dtype)
    return out if bias is None else out.add_(bias)


def _has_product(a: Tensor, out: Tensor) -> bool:
    """Whether PyTorch has a product of such factors with such a result; of fp16 on a CPU it has one, twenty
    times slower than fp32's."""
    if a.device.type == "cpu":
        return a.dtype == out.dtype != torch.float16
    return a.dtype == out.dtype or _widens(a.device.type)


@functools.cache
def _widens(device_type: str) -> bool:
    """Whether products of 16-bit factors can be added to fp32 there."""
    try:
        x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device_type)
        wide = x.float()
        torch.addmm(wide, x, x, out_dtype=torch.float32, out=wide)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False, rounded: bool = True) -> Tensor:
    """out = a @ b, or out += a @ b, summed in fp32 at least, into an `out` that may be wider.

    rounded: the product may be rounded to bf16 on its way. Where PyTorch has no product with a wider result,
        that is twice as fast.
    """
    if _has_product(a, out):
        mixed = {} if a.dtype == out.dtype else dict(out_dtype=out.dtype)
        return torch.addmm(out, a, b, beta=1, out=out, **mixed) if add else torch.mm(a, b, out=out, **mixed)
    (m, k), n = a.shape, b.shape[1]
    rounded = rounded and a.dtype == torch.bfloat16
    wide = (lambda x: x) if rounded else Tensor.float
    # by blocks of the longest dimension: of k, whose products are summed, where nothing is rounded in between
    longest = max(m, n) if rounded or out.dtype.itemsize == 2 else max(m, n, k)
    step = max(ROUND, BLOCK_BYTES // (4 * (m + n + k - longest - (k if rounded else 0))))
    blocks = [slice(i, i + step) for i in range(0, longest, step)]
    if longest == m:
        b = wide(b)
        for s in blocks:
            _put(out[s], wide(a[s]), b, add)
    elif longest == n:
        a = wide(a)
        for s in blocks:
            _put(out[:, s], a, wide(b[:, s]), add)
    else:
        for s in blocks:
            _put(out, wide(a[:, s]), wide(b[s]), add or s.start > 0)
    return out


def _put(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    else:
        out.add_(a @ b) if add else out.copy_(a @ b)


def sum_rows(z: Tensor, out: Tensor, add: bool) -> None:
    """out = z.sum(0), or out += z.sum(0), in out's dtype: on a CPU PyTorch casts before it sums, so by
    blocks."""
    step = (
        z.shape[1]
        if z.dtype == out.dtype or z.device.type != "cpu"
        else max(ROUND, BLOCK_BYTES // (4 * len(z)))
    )
    for i in range(0, z.shape[1], step):
        part = z[:, i : i + step].sum(0, dtype=out.dtype)
        out[i : i + step].copy_(out[i : i + step] + part if add else part)

"""The yardstick: KL(p, q) with its gradient as one would write it first in Triton, a program to a row, two sweeps, no options.

The first sweep keeps running log-sum-exps of both rows; the second goes backwards, so that it finds the row's end still in the
second-level cache, and writes (q - p) times a scale. The loss is either the first sweep's, from sum p (v - z), or the second's, as
sum p (e^d - 1 - d) with d = log q - log p, whose terms are never negative (sum p (e^d - 1) is 0). Within 1e-5; no masks, no labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
T = 2.0
# (lanes, classes to a lane, warps, whether the first sweep gives the loss)
VARIANTS = ((128, 8, 4, True), (256, 8, 8, True), (256, 8, 4, True), (128, 8, 4, False))


@triton.jit
def logits_at(X, columns, vocab, MASK: tl.constexpr, KEEP: tl.constexpr):
    if MASK:
        return tl.load(X + columns, mask=columns < vocab, other=float("-inf"), eviction_policy=KEEP).to(tl.float32)
    return tl.load(X + columns, eviction_policy=KEEP).to(tl.float32)


@triton.jit
def sums(z, v, top_z, top_v, sum_z, sum_v, cross, c, MASK: tl.constexpr, FIRST: tl.constexpr):
    """Running maxima and sums of each lane, in base 2, with a tile more."""
    new_z, new_v = tl.maximum(top_z, tl.max(z, 1)), tl.maximum(top_v, tl.max(v, 1))
    keep_z, keep_v = tl.math.exp2((top_z - new_z) * c), tl.math.exp2((top_v - new_v) * c)
    e = tl.math.exp2((v - new_v[:, None]) * c)
    sum_z = sum_z * keep_z + tl.sum(tl.math.exp2((z - new_z[:, None]) * c), 1)
    sum_v = sum_v * keep_v + tl.sum(e, 1)
    if FIRST:
        gap = tl.where(v > float("-inf"), v - z, 0.0) if MASK else v - z
        cross = cross * keep_v + tl.sum(e * gap, 1)
    return new_z, new_v, sum_z, sum_v, cross


@triton.jit
def gradient(G, columns, vocab, z, v, log_z, log_v, shift, loss, c, k, scale, MASK: tl.constexpr, FIRST: tl.constexpr):
    """(q - p) scale of a tile, written; the loss's terms of each lane, added."""
    q, p = tl.math.exp2(tl.fma(z, c, -log_z)), tl.math.exp2(tl.fma(v, c, -log_v))
    if not FIRST:
        d = tl.fma(z - v, k, -shift)
        loss += tl.sum(q - p - p * (tl.where(p > 0.0, d, 0.0) if MASK else d), 1)
    g = ((q - p) * scale).to(G.dtype.element_ty)
    if MASK:
        tl.store(G + columns, g, mask=columns < vocab, eviction_policy="evict_first")
    else:
        tl.store(G + columns, g, eviction_policy="evict_first")
    return loss


@triton.jit
def kl_rows(Z, V, G, LOSS, rows, vocab, c, k, scale, weight, LANES: tl.constexpr, RUN: tl.constexpr, FIRST: tl.constexpr):
    TILE: tl.constexpr = LANES * RUN
    tile = tl.arange(0, LANES)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    whole = vocab // TILE * TILE
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        start = (tl.full([], 0, tl.int64) + row) * vocab
        z_row, v_row, g_row = Z + start, V + start, G + start
        top_z = tl.full([LANES], -1e30, tl.float32)
        top_v, zero = top_z, tl.zeros([LANES], tl.float32)
        sum_z, sum_v, cross = zero, zero, zero
        for at in tl.range(0, whole, TILE):
            z, v = logits_at(z_row, at + tile, vocab, False, "evict_last"), logits_at(v_row, at + tile, vocab, False, "evict_last")
            top_z, top_v, sum_z, sum_v, cross = sums(z, v, top_z, top_v, sum_z, sum_v, cross, c, False, FIRST)
        if whole < vocab:
            z, v = logits_at(z_row, whole + tile, vocab, True, "evict_last"), logits_at(v_row, whole + tile, vocab, True, "evict_last")
            top_z, top_v, sum_z, sum_v, cross = sums(z, v, top_z, top_v, sum_z, sum_v, cross, c, True, FIRST)
        max_z, max_v = tl.max(top_z, 0), tl.max(top_v, 0)
        all_z = tl.sum(sum_z.to(tl.float64) * tl.math.exp2((top_z - max_z) * c), 0)
        all_v = tl.sum(sum_v.to(tl.float64) * tl.math.exp2((top_v - max_v) * c), 0)
        log_z = tl.log(all_z) * 1.4426950408889634 + max_z.to(tl.float64) * c
        log_v = tl.log(all_v) * 1.4426950408889634 + max_v.to(tl.float64) * c
        shift = (log_z - log_v) * 0.6931471805599453
        loss = zero
        if whole < vocab:
            z, v = logits_at(z_row, whole + tile, vocab, True, "evict_first"), logits_at(v_row, whole + tile, vocab, True, "evict_first")
            loss = gradient(
                g_row,
                whole + tile,
                vocab,
                z,
                v,
                log_z.to(tl.float32),
                log_v.to(tl.float32),
                shift.to(tl.float32),
                loss,
                c,
                k,
                scale,
                True,
                FIRST,
            )
        for back in tl.range(0, whole, TILE):
            at = whole - TILE - back
            z, v = logits_at(z_row, at + tile, vocab, False, "evict_first"), logits_at(v_row, at + tile, vocab, False, "evict_first")
            loss = gradient(
                g_row,
                at + tile,
                vocab,
                z,
                v,
                log_z.to(tl.float32),
                log_v.to(tl.float32),
                shift.to(tl.float32),
                loss,
                c,
                k,
                scale,
                False,
                FIRST,
            )
        if FIRST:
            value = tl.sum(cross.to(tl.float64) * tl.math.exp2((top_v - max_v) * c), 0) / all_v * k + shift
        else:
            value = tl.sum(loss.to(tl.float64), 0)
        tl.store(LOSS + row, (value * weight).to(tl.float32))


def kl(z: Tensor, v: Tensor, scale: float, weight: float, variant: tuple[int, int, int, bool]) -> tuple[Tensor, Tensor]:
    """(rows,) weight * KL at T = 2 and scale * (q - p), in the student's dtype, for contiguous (rows, V) logits."""
    lanes, run, warps, first = variant
    grad, loss = torch.empty_like(z), torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    processors = torch.cuda.get_device_properties(z.device).multi_processor_count if z.device.type == "cuda" else 132
    programs = min(z.shape[0], processors * 32 // warps)  # half of the threads that a multiprocessor holds
    kl_rows[(programs,)](z, v, grad, loss, *z.shape, LOG2E / T, 1 / T, scale, weight, lanes, run, first, num_warps=warps)
    return loss, grad


class _Mean(torch.autograd.Function):
    """The mean of T^2 KL, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx, z, v, variant):
        loss, grad = kl(z.detach(), v, T / len(z), T * T / len(z), variant)
        ctx.save_for_backward(grad)
        return loss.sum()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None, None


def variants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """name -> loss(z, v)."""
    names = (f"simple {lanes}x{run} {warps} warps loss {'first' if first else 'second'}" for lanes, run, warps, first in VARIANTS)
    return {name: (lambda z, v, x=x: _Mean.apply(z, v, x)) for name, x in zip(names, VARIANTS, strict=True)}

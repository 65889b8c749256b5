"""The accuracy that every backend holds, for fp32 inputs against 60 digits. Gradients are T dD/dz; norms are
Euclidean over a row.

A value comes back in fp32, whose own rounding (6e-8) is allowed on top. `spread` is the largest logit range
of the row over T: at low temperature and small vocabularies a row is a few classes, and the rounding of one
exponent, spread * 6e-8, is not averaged away.
"""

import math

import oracle

ROUND = 6e-8


def value_bound_of(name: str, vocab: int, T: float, spread: float, D: float) -> float:
    """Of the divergences but KL and Renyi's. TVD is a sum of differences of probabilities, whose own rounding
    is in it."""
    if name == "tvd":
        return (1.2e-6 * (1 + spread) + ROUND) * D + 1e-15
    if is_power(name) or name.startswith("reverse_renyi"):
        return value_bound(0.5, vocab, T, spread, D)
    relative = 1.2e-6 if vocab >= 32768 and T >= 0.5 else 1.2e-6 * (1 + spread)
    return (relative + ROUND) * D + 1e-30


def is_power(name: str) -> bool:
    """Whether D is a multiple of R - 1, R = sum p^order q^(1 - order)."""
    return oracle.member(name)[2] is not None


def gradient_bound_of(norm: float, D: float) -> float:
    """Of the same: where a gradient is q (log q / p - D), or the like, the rounding of both is in it."""
    return max(3e-6 * norm, 1e-6 * (1 + D))


def value_bound(order: float, vocab: int, T: float, spread: float, D: float, single: bool = False) -> float:
    """single: one class, an outlier, makes up most of D, so that its rounding errors meet no others to
    average with."""
    if order == 1:
        relative = (4e-7 if single else 3e-7) if vocab >= 32768 and T >= 0.5 else 1e-6 * (1 + spread)
    else:
        relative = 2e-5 if vocab >= 32768 and T >= 0.5 else 2e-5 + 1e-6 * spread
    return (relative + ROUND) * D + 1e-30


def gradient_bound(order: float, norm: float) -> float:
    return max(1e-6 * norm, 1e-7) if order == 1 else max(3e-6 * norm, 1e-6)


def cast_bound(dtype, exact):
    """One rounding of a 16-bit gradient: half a unit of the last place, of the smallest normal number at
    least."""
    import torch

    info = torch.finfo(dtype)
    return exact.abs() * info.eps * 0.5 * (1 + 1e-3) + info.smallest_normal * info.eps * 0.5


def spread_of(z, v, T: float) -> float:
    if math.isinf(T):
        return 0.0
    finite = [x[x > -math.inf] for x in (z, v)]
    return max(float(x.max() - x.min()) for x in finite) / T


def plain_value_bound(name: str, D: float) -> float:
    """Of Triton's plain form, for gradients of 16 bits: the rounding of sums and of their logarithm."""
    power = oracle.member(name)[2]
    return 3e-6 * (power.limit + abs(D)) if power else 1e-6 * (1 + abs(D))


def plain_rounding(name: str, spread: float, D: float) -> float:
    """Of its gradient, before that is rounded: an order multiplies exponents, and R - 1 has a factor with R
    in it besides."""
    kind, a, power = oracle.member(name)
    order = abs(power.order) if power else abs(a) if kind.endswith("renyi") else 1.0
    gain = max(power.limit, power.steepness(D)) if power else 1.0
    return (1e-6 + 1.5e-7 * spread * max(1.0, order)) * gain


def plain_gradient_bound(name: str, exact, dtype, spread: float, D: float) -> float:
    """Of the same: 1.05 times the rounding of the gradient's dtype, or that and, as if independent of it,
    what the plain form's own rounding makes, absolute."""
    own = plain_rounding(name, spread, D)
    rounding = float(cast_bound(dtype, exact).norm())
    rounded = float((exact.to(dtype).double() - exact).norm())
    return max(1.05 * rounded, math.hypot(min(rounding, rounded * 1.05), own))

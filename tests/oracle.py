"""What is right, by other means than the library's: 60 digits up to 1023 classes, 80-bit long double with series above.

Written from the definitions and imports nothing of kdkernels. Every function takes one row of student logits z and teacher logits v
(numpy arrays of any float dtype, taken as exact) and returns (value, gradient): D as long double and T dD/dz as long doubles.
"""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np

LD = np.longdouble
DIGITS_UP_TO = 1023  # classes


def divergence_row(z, v, name: str, T: float, engine: str | None = None):
    """(D, T dD/dz) of "kl", "cross_entropy" or "renyi(alpha)"; at T = inf the limit of T^2 D and its own gradient."""
    z, v = np.asarray(z, LD), np.asarray(v, LD)
    order = 1.0 if name in ("kl", "cross_entropy") else float(name[len("renyi(") : -1])
    engine = engine or ("mpmath" if len(z) <= DIGITS_UP_TO else "longdouble")
    if broken(z) or broken(v):
        return LD("nan"), np.full(len(z), LD("nan"))
    if math.isinf(T):
        if name == "cross_entropy" or math.isinf(order):
            raise ValueError(f"{name} has no limit")
        return _limit(z, v, order)
    no_z, no_v = np.isneginf(z), np.isneginf(v)
    lone_p, common = (no_z & ~no_v).any(), (~no_z & ~no_v).any()
    infinite = lone_p if order >= 1 else not common
    if infinite:  # D = +inf: the gradient of KL, q - p, where the student has the class (q alone for order inf)
        p, q = _softmax(v, T), _softmax(z, T)
        g = q - (p if not math.isinf(order) else 0)
        return LD("inf"), np.where(no_z, LD(0), g)
    value, g = (_digits if engine == "mpmath" else _long_double)(z, v, name, order, T)
    return value, np.where(no_z, LD(0), g)


def hard_row(z, label: int):
    """(CE, dCE/dz) at T = 1."""
    with mp.workdps(60):
        x = [mp.mpf(float(t)) for t in z]
        top = max(x)
        e = [mp.exp(t - top) for t in x]
        total = mp.fsum(e)
        others = mp.fsum(e[:label] + e[label + 1 :])
        g = [t / total for t in e]
        g[label] = -others / total
        return LD(mp.nstr(mp.log(total) - (x[label] - top), 25)), _to_ld(g)


def logit_matching_row(z, v, center: bool = False):
    """|z - v|^2 / (2 V) and its gradient (z - v) / V; center takes the mean of z - v off first."""
    d = np.asarray(z, LD) - np.asarray(v, LD)
    d = d - d.mean() if center else d
    return (d * d).sum() / (2 * len(d)), d / len(d)


def log_softmax_row(z, T: float):
    with mp.workdps(60):
        x = [mp.mpf(float(t)) / mp.mpf(T) for t in z]
        top = max(x)
        total = mp.log(mp.fsum(mp.exp(t - top) for t in x))
        return _to_ld([t - top - total for t in x])


def broken(x) -> bool:
    return bool(np.isnan(x).any() or np.isposinf(x).any() or np.isneginf(x).all())


def _to_ld(xs):
    # an mpf as the sum of two doubles keeps 80 bits without a detour through text
    highs = [float(x) for x in xs]
    return np.array(highs, LD) + np.array([float(x - h) for x, h in zip(xs, highs, strict=True)], LD)


def _softmax(x, T):
    e = np.exp((x - x.max()) / LD(T))
    return e / e.sum()


def _limit(z, v, order):
    no_z, no_v = np.isneginf(z), np.isneginf(v)
    both = ~no_z & ~no_v
    n = max(int(both.sum()), 1)
    d = np.where(both, np.where(both, z, 0) - np.where(both, v, 0), LD(0))
    d = np.where(both, d - d.sum() / n, LD(0))
    lost = (no_v & ~no_z).any() if order == 0 else (no_v != no_z).any()
    return (LD("inf") if lost else LD(order) / 2 * (d * d).sum() / n), LD(order) * d / n


# ---------------------------------------------------------------- 60 digits: the definitions as they stand


def _digits(z, v, name, order, T):
    with mp.workdps(60):
        ninf = mp.mpf("-inf")
        T = mp.mpf(T)

        def log_softmax(x):
            x = [ninf if np.isneginf(t) else mp.mpf(float(t)) + mp.mpf(float(t - LD(float(t)))) for t in x]
            top = max(x)
            e = [t if t == ninf else (t - top) / T for t in x]
            total = mp.log(mp.fsum(mp.exp(t) for t in e if t != ninf))
            return [t if t == ninf else t - total for t in e]

        lp, lq = log_softmax(v), log_softmax(z)
        exp = lambda x: mp.mpf(0) if x == ninf else mp.exp(x)  # noqa: E731
        q = [exp(x) for x in lq]
        if order == 1:
            p = [exp(x) for x in lp]
            value = mp.fsum(a * ((x if name == "kl" else 0) - y) for a, x, y in zip(p, lp, lq, strict=True) if a)
            w = p
        elif order == 0:
            inside = mp.fsum(b for b, x in zip(q, lp, strict=True) if x != ninf)
            value = -mp.log(inside)
            w = [b / inside if x != ninf else mp.mpf(0) for b, x in zip(q, lp, strict=True)]
        elif math.isinf(order):
            # ties are ties of v - z as given, not of numbers that have been through a division
            gaps = [mp.mpf("-inf") if x == ninf else mp.mpf(float(a)) - mp.mpf(float(b)) for a, b, x in zip(v, z, lp, strict=True)]
            most = max(gaps)
            value = max(x - y for x, y in zip(lp, lq, strict=True) if x != ninf)
            total = mp.fsum(b for b, g in zip(q, gaps, strict=True) if g == most)
            w = [b / total if g == most else mp.mpf(0) for b, g in zip(q, gaps, strict=True)]
        else:
            a = mp.mpf(order)
            u = [ninf if ninf in (x, y) else a * x + (1 - a) * y for x, y in zip(lp, lq, strict=True)]
            top = max(u)
            log_r = top + mp.log(mp.fsum(mp.exp(x - top) for x in u if x != ninf))
            value = log_r / (a - 1)
            w = [exp(x - log_r) if x != ninf else mp.mpf(0) for x in u]
        return LD(mp.nstr(value, 25)), _to_ld([b - c for b, c in zip(q, w, strict=True)])


# ---------------------------------------------------------------- long double: forms in which nothing cancels


def _long_double(z, v, name, order, T):
    T = LD(T)
    no_z, no_v = np.isneginf(z), np.isneginf(v)
    both, none = ~no_z & ~no_v, no_z & no_v
    ez, ev = np.exp((z - z.max()) / T), np.exp((v - v.max()) / T)
    sz, sv = ez.sum(), ev.sum()
    p, q = ev / sv, ez / sz
    y = np.zeros(len(z), LD)
    y[both] = ((z[both] - v[both]) - (z.max() - v.max())) / T
    small = both & (np.abs(y) < 1)
    away = np.where(small, ev * np.expm1(np.where(small, y, 0)), ez - ev).sum() / sv
    c = np.log1p(away) if abs(away) < 0.5 else np.log(sz) - np.log(sv)
    d = y - c  # log q - log p, where both are there

    if order == 0:
        inside, outside = q[~no_v].sum(), q[no_v].sum()
        return np.log1p(outside / inside), np.where(no_v, q, -q * outside / inside)
    if math.isinf(order):
        gap = np.where(no_v, LD("inf"), np.where(both, z, 0) - np.where(both, v, 0))
        least = gap == gap.min()
        total = q[least].sum()
        return -d[least][0], np.where(least, -q * (q[~least].sum() / total), q)
    if order == 1:
        near = both & (np.abs(d) < 0.5)
        x = np.where(near, d, 0)
        direct = np.where(no_v, q, (q - p) - np.where(both, p * d, 0))
        value = np.where(near, p * _series(x, LD(0)), np.where(none, 0, direct)).sum()
        if name == "cross_entropy":
            first = int(np.argmax(v))
            rest = np.delete(ev, first).sum()
            value += (p[~no_v] * (np.log1p(rest) - (v[~no_v] - v.max()) / T)).sum()
        return value, np.where(near, p * np.expm1(x), q - p)

    a = LD(order)
    b = 1 - a
    u = np.full(len(z), LD("-inf"))
    u[both] = (v[both] - v.max()) / T + b * y[both]
    eu = np.exp(u - u.max())
    log_r = u.max() + np.log(eu.sum()) - np.log(sv) - b * c
    w = eu / eu.sum()
    if abs(log_r) < 0.5:
        near = both & (np.abs(d) < 0.5) & (np.abs(b * d) < 0.5)
        x = np.where(near, d, 0)
        t = w * np.exp(log_r)
        direct = ((q - p) - (t - p) / b) / (1 - b)
        F = np.where(near, p * _series(x, b), np.where(none, 0, direct)).sum()
        log_r = np.log1p(-b * (1 - b) * F)
    x = b * d - log_r
    near = both & (np.abs(d) < 0.5) & (np.abs(x) < 0.5)
    g = np.where(near, p * (np.expm1(np.where(near, d, 0)) - np.expm1(np.where(near, x, 0))), q - w)
    return log_r / (a - 1), g


def _series(d, b, terms: int = 26):
    """sum_{j >= 2} (1 + b + ... + b^(j-2)) d^j / j!"""
    out, power, geometric, b_power = np.zeros_like(d), d.copy(), LD(0), LD(1)
    for j in range(2, terms):
        power = power * d / j
        geometric += b_power
        b_power *= b
        out += geometric * power
    return out

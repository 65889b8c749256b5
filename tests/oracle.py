"""What is right, by other means than the library's: 60 digits up to 1023 classes, 80-bit long double with
series above.

Written from the definitions and imports nothing of kdkernels. Every function takes one row of student logits
z and teacher logits v (numpy arrays of any float dtype, taken as exact) and returns (value, gradient): D as
long double and T dD/dz as long doubles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mpmath as mp
import numpy as np

LD = np.longdouble
DIGITS_UP_TO = 1023  # classes


def parse(name: str) -> tuple[str, float]:
    """("renyi", 0.5) of "renyi(0.5)"; the parameter is 0.5 where none is given."""
    kind, _, rest = name.partition("(")
    return kind, float(rest[:-1] or 0.5) if rest else 0.5


# D = scale (sum p^order q^(1 - order) - 1): order and scale of the parameter, in whatever numbers that is.
# "reverse_" before a name exchanges p and q. The limit at order 1 is KL, at order 0 reverse KL.
POWERS = {
    "alpha": (lambda a: a, lambda a: 1 / (a * (a - 1))),
    "tsallis": (lambda a: a, lambda a: 1 / (a - 1)),
    "squared_hellinger": (lambda _: 0.5, lambda _: -1.0),
    "chi_square": (lambda _: 2.0, lambda _: 1.0),
}


class Power(NamedTuple):
    order: float
    scale: float

    @property
    def limit(self) -> float:
        """T^2 D -> limit / 2 Var(z - v)."""
        return self.scale * self.order * (self.order - 1)

    def steepness(self, D: float) -> float:
        """What q - w is multiplied by in T dD/dz, of that D."""
        return abs(self.scale + D) * abs(1 - self.order)


def member(name: str, number=float):
    """(kind, parameter, its `Power` or None) of a text form; a limit is by the name of what it is."""
    kind, a = parse(name)
    mirrored = kind.startswith("reverse_") and kind.removeprefix("reverse_") in POWERS
    order_of, scale_of = POWERS.get(kind.removeprefix("reverse_") if mirrored else kind, (None, None))
    if order_of:
        order = 1 - order_of(number(a)) if mirrored else order_of(number(a))
        if order not in (0, 1):
            return kind, a, Power(order, scale_of(number(a)))
        kind = "kl" if order == 1 else "reverse_kl"
    elif (kind, a) in (("renyi", 1), ("jsd", 0), ("skew_kl", 0), ("mixed_kl", 1)):
        kind = "kl"
    elif (kind, a) in (("reverse_renyi", 1), ("jsd", 1), ("skew_reverse_kl", 0), ("mixed_kl", 0)):
        kind = "reverse_kl"
    return kind, a, None


def reverse(name: str) -> str:
    """Of the divergence with p and q exchanged."""
    kind, a = parse(name)
    if kind in ("jsd", "mixed_kl"):
        return f"{kind}({1 - a!r})"
    if kind == "tvd":
        return name
    if kind.startswith("skew"):
        return name.replace("skew_", "skew_reverse_") if kind == "skew_kl" else name.replace("reverse_", "")
    return name.removeprefix("reverse_") if kind.startswith("reverse_") else f"reverse_{name}"


def divergence_row(z, v, name: str, T: float, engine: str | None = None):
    """(D, T dD/dz) of a divergence's text form; at T = inf the limit of T^2 D and its own gradient."""
    z, v = np.asarray(z, LD), np.asarray(v, LD)
    engine = engine or ("mpmath" if len(z) <= DIGITS_UP_TO else "longdouble")
    if broken(z) or broken(v):
        return LD("nan"), np.full(len(z), LD("nan"))
    kind, a, power = member(name)
    if math.isinf(T):
        return _limit(z, v, kind, a, power)
    no_z, no_v = np.isneginf(z), np.isneginf(v)
    if _infinite(kind, a, power, no_z, no_v):
        return LD("inf"), np.where(no_z, LD(0), _gradient_where_infinite(z, v, kind, a, T))
    value, g = (_digits if engine == "mpmath" else _long_double)(z, v, name, T)
    return value, np.where(no_z, LD(0), g)


def _infinite(kind, a, power, no_z, no_v) -> bool:
    lone_p, lone_q, common = (no_z & ~no_v).any(), (no_v & ~no_z).any(), (~no_z & ~no_v).any()
    if kind in ("kl", "cross_entropy"):
        return lone_p
    if kind == "mixed_kl":
        return lone_p or lone_q
    if kind == "renyi":
        return lone_p if a >= 1 else not common
    if kind == "reverse_renyi":
        return lone_q if a >= 1 else not common
    if power:
        return lone_p if power.order > 1 else lone_q if power.order < 0 else False
    return lone_q if kind == "reverse_kl" else False


def _gradient_where_infinite(z, v, kind, a, T):
    """The convention: q - p where the formula has a w, q alone where w is a set; nan where it has an infinite
    moment."""
    p, q = _softmax(v, T), _softmax(z, T)
    if kind in ("kl", "cross_entropy", "renyi"):
        return q if kind == "renyi" and math.isinf(a) else q - p
    if kind == "reverse_renyi":
        return np.zeros_like(q) if a == 0 else -q if math.isinf(a) else LD(a) / (1 - LD(a)) * (q - p)
    return np.full(len(z), LD("nan"))


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


def _limit(z, v, kind, a, power):
    """(k/2) Var(z - v) and its gradient."""
    k = {
        "kl": 1,
        "reverse_kl": 1,
        "mixed_kl": 1,
        "renyi": a,
        "reverse_renyi": a,
        "jsd": a * (1 - a),
        "skew_kl": (1 - a) ** 2,
        "skew_reverse_kl": (1 - a) ** 2,
    }.get(kind, power.limit if power else math.inf)
    if math.isinf(k):
        raise ValueError(f"{kind} has no limit")
    no_z, no_v = np.isneginf(z), np.isneginf(v)
    both = ~no_z & ~no_v
    n = max(int(both.sum()), 1)
    d = np.where(both, np.where(both, z, 0) - np.where(both, v, 0), LD(0))
    d = np.where(both, d - d.sum() / n, LD(0))
    lost = (no_v != no_z).any()
    if k == 0:  # order 0 asks only whose support it is
        lost = (no_z & ~no_v if kind == "reverse_renyi" else no_v & ~no_z).any()
    return (LD("inf") if lost else LD(k) / 2 * (d * d).sum() / n), LD(k) * d / n


# ---------------------------------------------------------------- 60 digits: the definitions as they stand


def _digits(z, v, name, T):
    with mp.workdps(60):
        kind, a, member_of = member(name, mp.mpf)
        ninf = mp.mpf("-inf")
        T = mp.mpf(T)

        def log_softmax(x):
            x = [ninf if np.isneginf(t) else mp.mpf(float(t)) + mp.mpf(float(t - LD(float(t)))) for t in x]
            top = max(x)
            e = [t if t == ninf else (t - top) / T for t in x]
            total = mp.log(mp.fsum(mp.exp(t) for t in e if t != ninf))
            return [t if t == ninf else t - total for t in e]

        def kl(x, y):  # of lists of logarithms
            return mp.fsum(mp.exp(s) * (s - t) for s, t in zip(x, y, strict=True) if s != ninf)

        def mixed(weight):  # log((1 - weight) p + weight q)
            sums = [(1 - weight) * a + weight * b for a, b in zip(p, q, strict=True)]
            return [mp.log(x) if x else ninf for x in sums]

        def power(order):  # (log R, w)
            u = [ninf if ninf in (x, y) else order * x + (1 - order) * y for x, y in zip(lp, lq, strict=True)]
            top = max(u)
            if top == ninf:
                return ninf, [mp.mpf(0)] * len(u)
            log_r = top + mp.log(mp.fsum(mp.exp(x - top) for x in u if x != ninf))
            return log_r, [exp(x - log_r) if x != ninf else mp.mpf(0) for x in u]

        def restricted(x, inside):  # x to a set, normalised
            total = mp.fsum(t for t, i in zip(x, inside, strict=True) if i)
            return [t / total if i else mp.mpf(0) for t, i in zip(x, inside, strict=True)]

        def moment(phi):  # T dD/dz = p phi'(d) - q sum p phi'(d), phi given as p phi'(d)
            total = mp.fsum(phi)
            return [x - y * total for x, y in zip(phi, q, strict=True)]

        lp, lq = log_softmax(v), log_softmax(z)
        exp = lambda x: mp.mpf(0) if x == ninf else mp.exp(x)  # noqa: E731
        p, q = [exp(x) for x in lp], [exp(x) for x in lq]
        d = [mp.mpf(0) if ninf in (x, y) else y - x for x, y in zip(lp, lq, strict=True)]
        a = mp.mpf(a)
        if kind in ("kl", "cross_entropy"):
            value = (
                -mp.fsum(x * y for x, y in zip(p, lq, strict=True) if x)
                if kind == "cross_entropy"
                else kl(lp, lq)
            )
            g = [y - x for x, y in zip(p, q, strict=True)]
        elif kind == "reverse_kl":
            value, g = kl(lq, lp), moment([y * t for y, t in zip(q, d, strict=True)])
        elif kind == "mixed_kl":
            value = a * kl(lp, lq) + (1 - a) * kl(lq, lp)
            g = moment([(1 - a) * y * t - a * x for x, y, t in zip(p, q, d, strict=True)])
        elif kind == "jsd":
            m = mixed(1 - a)
            value = a * kl(lp, m) + (1 - a) * kl(lq, m)
            g = moment([(1 - a) * y * (s - t) if y else mp.mpf(0) for y, s, t in zip(q, lq, m, strict=True)])
        elif kind == "skew_kl":
            m = mixed(1 - a)
            value = kl(lp, m)
            g = moment(
                [-(1 - a) * y * x / exp(t) if y else mp.mpf(0) for x, y, t in zip(p, q, m, strict=True)]
            )
        elif kind == "skew_reverse_kl":
            m = mixed(a)
            value = kl(lq, m)
            g = moment(
                [y * (s - t - a * y / exp(t)) if y else mp.mpf(0) for y, s, t in zip(q, lq, m, strict=True)]
            )
        elif kind == "tvd":
            value = mp.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
            # ties are ties of the numbers to be told apart: 60 digits leave 1e-50 of a difference that is 0
            g = moment(
                [
                    y * (mp.sign(y - x) if abs(y - x) > mp.mpf("1e-50") * y else 0) / 2
                    for x, y in zip(p, q, strict=True)
                ]
            )
        elif kind in ("renyi", "reverse_renyi") and a == 0:
            x, lx = (q, lp) if kind == "renyi" else (p, lq)
            value = -mp.log(mp.fsum(s for s, t in zip(x, lx, strict=True) if t != ninf))
            g = (
                [y - w for y, w in zip(q, restricted(q, [t != ninf for t in lp]), strict=True)]
                if kind == "renyi"
                else [mp.mpf(0)] * len(q)
            )
        elif kind in ("renyi", "reverse_renyi") and mp.isinf(a):
            sign, support = (1, lp) if kind == "renyi" else (-1, lq)
            # ties are ties of v - z as given, not of numbers that have been through a division
            gaps = [
                ninf if x == ninf else sign * (mp.mpf(float(s)) - mp.mpf(float(t)))
                for s, t, x in zip(v, z, support, strict=True)
            ]
            most = max(gaps)
            value = max(sign * (x - y) for x, y, t in zip(lp, lq, support, strict=True) if t != ninf)
            g = [sign * (y - w) for y, w in zip(q, restricted(q, [t == most for t in gaps]), strict=True)]
        elif kind == "renyi":
            log_r, w = power(a)
            value, g = log_r / (a - 1), [y - x for x, y in zip(w, q, strict=True)]
        elif kind == "reverse_renyi":
            log_r, w = power(1 - a)
            value, g = log_r / (a - 1), [a / (a - 1) * (x - y) for x, y in zip(w, q, strict=True)]
        else:
            order, scale = member_of
            log_r, w = power(order)
            R = exp(log_r)
            slope = scale * (1 - order) * R
            value, g = scale * (R - 1), [slope * (x - y) for x, y in zip(w, q, strict=True)]
        return LD(mp.nstr(value, 25)), _to_ld(g)


# ---------------------------------------------------------------- long double: forms in which nothing cancels


def _long_double(z, v, name, T):
    kind, a, member_of = member(name, LD)
    T, a = LD(T), LD(a)
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

    def power(order):  # (log R, R - 1, q - w)
        b = 1 - order
        u = np.full(len(z), LD("-inf"))
        u[both] = (v[both] - v.max()) / T + b * y[both]
        eu = np.exp(u - u.max())
        log_r = u.max() + np.log(eu.sum()) - np.log(sv) - b * c
        w = eu / eu.sum()
        more = np.expm1(log_r)
        if abs(log_r) < 0.5:
            near = both & (np.abs(d) < 0.5) & (np.abs(b * d) < 0.5)
            t = w * np.exp(log_r)
            direct = ((q - p) - (t - p) / b) / (1 - b)
            F = np.where(near, p * _series(np.where(near, d, 0), b), np.where(none, 0, direct)).sum()
            more = -b * (1 - b) * F
            log_r = np.log1p(more)
        x = b * d - log_r
        near = both & (np.abs(d) < 0.5) & (np.abs(x) < 0.5)
        g = np.where(near, p * (np.expm1(np.where(near, d, 0)) - np.expm1(np.where(near, x, 0))), q - w)
        return log_r, more, g

    def psi(x):
        near = np.abs(x) < 1
        return np.where(near, _series(np.where(near, x, 0), LD(0)), np.expm1(np.minimum(x, 11000)) - x)

    def share(weight, x):  # log(m / p) for log(q / p) = x and m = (1 - weight) p + weight q
        if weight == 1:
            return x
        safe = np.minimum(x, 11000)
        return np.log1p(weight * np.expm1(safe)) + (x - safe)

    def moment(phi):
        return phi - q * phi.sum()

    if kind in ("renyi", "reverse_renyi") and a == 0:
        x, lone = (q, no_v) if kind == "renyi" else (p, no_z)
        inside, outside = x[~lone].sum(), x[lone].sum()
        return np.log1p(outside / inside), np.where(
            no_v, q, -q * outside / inside
        ) if kind == "renyi" else np.zeros_like(q)
    if kind in ("renyi", "reverse_renyi") and np.isinf(a):
        sign, lone = (1, no_v) if kind == "renyi" else (-1, no_z)
        gap = np.where(lone, LD("inf"), sign * (np.where(both, z, 0) - np.where(both, v, 0)))
        least = gap == gap.min()
        total = q[least].sum()
        return -sign * d[least][0], sign * np.where(least, -q * (q[~least].sum() / total), q)
    if kind in ("kl", "cross_entropy"):
        near = both & (np.abs(d) < 0.5)
        x = np.where(near, d, 0)
        direct = np.where(no_v, q, (q - p) - np.where(both, p * d, 0))
        value = np.where(near, p * _series(x, LD(0)), np.where(none, 0, direct)).sum()
        if kind == "cross_entropy":
            first = int(np.argmax(v))
            rest = np.delete(ev, first).sum()
            value += (p[~no_v] * (np.log1p(rest) - (v[~no_v] - v.max()) / T)).sum()
        return value, np.where(near, p * np.expm1(x), q - p)
    if kind == "renyi":
        log_r, _, g = power(a)
        return log_r / (a - 1), g
    if kind == "reverse_renyi":
        log_r, _, g = power(1 - a)
        return log_r / (a - 1), a / (1 - a) * g
    if member_of:
        order, scale = member_of
        log_r, more, g = power(order)
        return scale * more, -scale * (1 - order) * np.exp(log_r) * g
    if kind == "mixed_kl":  # a class that one alone has makes D infinite
        of_p, of_q = np.where(both, p * psi(d), 0), np.where(both, q * psi(-d), 0)
        near = both & (np.abs(d) < 1)
        gap = np.where(near, p * np.expm1(np.where(near, d, 0)), q - p)
        return a * of_p.sum() + (1 - a) * of_q.sum(), a * gap + (1 - a) * moment(np.where(both, q * d, 0))
    if kind == "tvd":
        near = both & (np.abs(d) < 0.5)
        gap = np.where(near, p * np.expm1(np.where(near, d, 0)), q - p)
        return np.abs(gap).sum() / 2, moment(q * np.sign(gap) / 2)
    # mixtures: sums of p psi(log m/p) and q psi(log m/q), whose classes that one alone has are limits of
    #     these
    weight = {"jsd": 1 - a, "skew_kl": 1 - a, "skew_reverse_kl": a}.get(kind, LD(0))
    of_p = np.where(both, p * psi(share(weight, d)), 0)
    of_q = np.where(both, q * psi(share(1 - weight, -d)), 0)
    x = np.where(both, -share(1 - weight, -d), 0)  # log(q / m)
    q_more = np.where(both, np.expm1(x), 0)  # q / m - 1, and p / m - 1
    p_more = np.where(both, np.expm1(-share(weight, d)), 0)
    # so deep a mask that one of p and q is 0 beside the other, whatever is finite in the logits
    lone_p, lone_q = no_z & ~no_v | both & (d < -11000), no_v & ~no_z | both & (d > 11000) & (weight > 0)
    if weight > 0:
        of_p[lone_q], of_q[lone_q] = q[lone_q] * weight, q[lone_q] * (weight - 1 - np.log(weight))
        q_more[lone_q], x[lone_q] = 1 / weight - 1, -np.log(weight)
    p_more[lone_q] = -1
    of_p[lone_p], of_q[lone_p] = p[lone_p] * (-weight - np.log1p(-weight)), p[lone_p] * (1 - weight)
    if kind == "jsd":
        return a * of_p.sum() + (1 - a) * of_q.sum(), moment((1 - a) * q * x)
    if kind == "skew_kl":
        return of_p.sum(), moment((1 - a) * q * -p_more)
    return of_q.sum(), moment(q * (x - weight * q_more))


def _series(d, b, terms: int = 26):
    """sum_{j >= 2} (1 + b + ... + b^(j-2)) d^j / j!"""
    out, power, geometric, b_power = np.zeros_like(d), d.copy(), LD(0), LD(1)
    for j in range(2, terms):
        power = power * d / j
        geometric += b_power
        b_power *= b
        out += geometric * power
    return out

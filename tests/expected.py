"""What is right for a call (`Case`), from tests/oracle.py, and what is allowed, from tests/bounds.py. Nothing
here asks the package.

Where bounds.py has no bound (hard terms, transforms, products, what gives no loss) the slack stands where it
is added, with its reason. A check is (what, found, right, allowed, whether allowed is of a row's norm).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import oracle
import torch
from bounds import (
    cast_bound,
    gradient_bound,
    gradient_bound_of,
    plain_rounding,
    plain_value_bound,
    spread_of,
    value_bound,
    value_bound_of,
)
from calls import DTYPES, PER_CLASS, Case, gradient, run, side_of

LD, INF, NAN = np.longdouble, np.longdouble("inf"), np.longdouble("nan")
DEEPEST = 110.0  # an exponent beyond that is 0 in fp32, whatever its rounding: so deep is a row at most
FLUSHED = 1.2e-38  # an exponential smaller than that is 0
SIDES = ("student", "teacher")


def judge(case: Case) -> str | None:
    """What is wrong with a call, None for nothing."""
    with np.errstate(all="ignore"):
        try:
            found = run(case)
        except Exception as error:
            return f"raises {type(error).__name__}: {error}"
        for engine in ("longdouble", "mpmath"):
            checks = CHECKS.get(case.call, of_loss)(case, found, engine)
            failure = next((x for x in (compare(*check) for check in checks) if x), None)
            if failure is None:
                return None
        return failure


def compare(what: str, found: torch.Tensor, right, allowed, by_norm: bool = False) -> str | None:
    """What is wrong, None for nothing; what the dtype cannot hold is its infinity, or nearly its largest
    number."""
    top = min(torch.finfo(found.dtype).max, 1e300) if found.dtype.is_floating_point else math.inf
    x = found.detach().double().numpy()
    fit = lambda y: np.broadcast_to(np.reshape(y, x.shape) if np.size(y) == x.size else y, x.shape)  # noqa: E731
    right, room = (
        fit(right),
        np.broadcast_to(np.reshape(allowed, (-1, 1)), x.shape) if by_norm else fit(allowed),
    )
    # beyond 1e300, fp64 itself has overflown before
    same_sign = np.sign(x) == np.sign(right) if top < 1e300 else np.isfinite(right)
    beyond = (np.abs(right) >= 0.998 * top) & (
        x == right if math.isinf(top) else same_sign & ~(np.abs(x) < 0.99 * top) | (x == right)
    )
    settled = (room >= top) | (room == INF) | beyond | np.isnan(right) & np.isnan(x)
    error = np.where(settled, 0, np.abs(x - right))
    error = np.where(np.isnan(error), INF, error)
    total = fit(np.sqrt((error * error).sum(-1, keepdims=True))) if by_norm else error
    bad = ~(total <= room) & ~(total <= 1e-50)  # 60 digits, of which sums take some
    if not bad.any():
        return None
    at = np.unravel_index(np.argmax(np.where(bad, error, -1)), x.shape)
    where = f", at {tuple(map(int, at))}" if x.size > 1 else ""
    return (
        f"{what}: found {x[at]:.9g}, right {right[at]:.9g}, off by {total[at]:.3g} where "
        f"{room[at]:.3g} is allowed{where}"
    )


# ---------------------------------------------------------------- inputs


def rounded(x, dtype: str) -> np.ndarray:
    return torch.from_numpy(np.array(x, float)).to(DTYPES[dtype]).double().numpy().astype(LD)


def is_double(case: Case) -> bool:
    return case.dtypes[0] == "fp64"


def unit(case: Case) -> float:
    """Half a unit of the last place; of fp64 what is held of it."""
    return 1e-12 if is_double(case) else 6e-8


def logits(case: Case, side: int) -> np.ndarray:
    """(rows, V), exact; heads are drawn so that their products are exact as well."""
    x = {name: rounded(y, case.dtypes[side]) for name, y in case.tensors.items() if side_of(name) == side}
    out = x.get("zv"[side])
    if out is None:
        h, w, b = (x.get("t" * side + name) for name in "hwb")
        out = h @ w.T + (0 if b is None else b)
    return np.broadcast_to(out[:1], out.shape) if case.layouts[side] == "expanded" else out


def transformed(case: Case, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits, slope)."""
    x, how = logits(case, side), case.get(f"{SIDES[side]}_transform")
    scale, cap = (LD(1), None) if how is None else (LD(how.scale), how.softcap)
    if cap is None:
        return scale * x, np.broadcast_to(scale, x.shape)
    inside, masked = np.where(np.isinf(x), 0, x) * scale / cap, np.isinf(x)
    return np.where(masked, x, cap * np.tanh(inside)), np.where(
        masked, 0, scale / np.cosh(np.clip(inside, -5000, 5000)) ** 2
    )


def weights(case: Case) -> np.ndarray:
    w = np.ones(case.rows) if case.weight is None else np.float32(case.weight).astype(float)
    return (
        w
        if case.labels is None
        else np.where(np.array(case.labels) == case.get("ignore_index", -100), 0.0, w)
    )


def factors(case: Case, w: np.ndarray) -> tuple[np.ndarray, LD]:
    """(of each row's gradient, what values are divided by): upstream gradient, reduction, weights."""
    mean = case.get("reduction", "mean") == "mean"
    denominator = LD(float(case.get("num_items", w.sum() or 1.0))) if mean else LD(1)
    return rounded(case.upstream, "fp64" if is_double(case) else "fp32") / denominator * w, denominator


def finite(x):
    return np.where(np.isfinite(x), x, 0)


def norm(x) -> float:
    return float(np.sqrt((finite(x) ** 2).sum()))


def cast(dtype: torch.dtype, x) -> np.ndarray:
    return cast_bound(dtype, torch.from_numpy(finite(x).astype(float))).numpy().astype(LD)


def broken(*rows) -> bool:
    return any(oracle.broken(x) for x in rows)


def depth(x, T: float) -> float:
    """The range of a row's logits over T, as far as exponents go."""
    here = x[~np.isneginf(x)]
    return min(float(here.max() - here.min()) / T, DEEPEST)


# ---------------------------------------------------------------- rows


def log_softmax(x, T: float) -> np.ndarray:
    top = x.max()
    e = np.exp((x - top) / LD(T)) if T < math.inf else np.where(np.isneginf(x), LD(0), LD(1))
    e[int(np.argmax(x))] = 0
    return np.where(np.isneginf(x), x, (x - top) / LD(T)) - np.log1p(e.sum())


def soft_row(z, v, name: str, T: float, engine: str):
    """(D, T dD/dz) as `oracle.divergence_row`; "matching" is |z - v|^2 / (2 V)."""
    if name != "matching":
        return oracle.divergence_row(z, v, name, T, engine)
    if broken(z, v):
        return NAN, np.full(len(z), NAN)
    both = ~np.isneginf(z) & ~np.isneginf(v)
    d, n = np.where(both, finite(z) - finite(v), 0), max(int(both.sum()), 1)
    return (INF if (np.isneginf(z) != np.isneginf(v)).any() else (d * d).sum() / (2 * n)), d / n


def teacher_row(z, v, name: str, T: float, engine: str):
    """T dD/dv: the gradient of the divergence with the two exchanged; the cross entropy has the teacher's own
    entropy besides."""
    kind, _ = oracle.parse(name)
    if kind == "matching":
        return soft_row(v, z, name, T, engine)[1]
    if kind == "cross_entropy":
        p, log_q = np.exp(log_softmax(v, T)), np.where(np.isneginf(v), 0, log_softmax(z, T))
        return p * ((p * log_q).sum() - log_q)
    return soft_row(v, z, oracle.reverse(name), T, engine)[1]


def soft_bounds(case: Case, row: int, z, v, D, size: float, of_teacher: bool = False) -> tuple[float, float]:
    """Of D, and of T dD/dz or T dD/dv of that norm. Logits are rounded at their size in fp64, whose square is
    in D."""
    name, T = case.divergence, case.at(row).temperature
    if broken(z, v):
        return 0.0, 0.0
    D, (kind, a) = float(finite(D)), oracle.parse(name)
    offset = 1e-15 * (1e3 + min(max(float(np.abs(finite(x)).max()) for x in (z, v)), 1e6))
    if is_double(case):  # test_fp64_is_fp64
        return 1e-9 * D + offset**2 + 1e-15 * (kind == "tvd"), max(1e-9 * size, 10 * offset * (1 + D))
    spread = min(spread_of(z, v, T), DEEPEST)
    order = {"kl": 1.0, "matching": 1.0, "cross_entropy": 1.0, "renyi": a}.get(kind)
    room = gradient_bound_of(size, D) if order is None or of_teacher else gradient_bound(order, size)
    if kind == "tvd":
        room += undecided(*((v, z) if of_teacher else (z, v)), T)
    value = (
        value_bound_of(name, case.vocab, T, spread, D)
        if order is None
        else value_bound(order, case.vocab, T, spread, D)
    )
    if is_plain(case):
        value = max(value, plain_value_bound(name, D))
        room = max(room, plain_rounding(name, spread, D))
    return value + offset**2, room


def is_plain(case: Case) -> bool:
    """Whether Triton takes its plain form, which has bounds of its own; `test_which_form_a_call_takes`."""
    own = isinstance(case.get("temperature"), torch.Tensor)
    few = "fp32" != case.dtypes[0] != "fp64"
    return case.get("backend") == "triton" and few and case.temperature <= 8 and not own


def undecided(z, v, T: float) -> float:
    """Of TVD: the norm of a gradient that may come of classes where q - p is within rounding of 0, whose sign
    is anybody's."""
    p, q = np.exp(log_softmax(v, T)), np.exp(log_softmax(z, T))
    near = np.where(np.abs(q - p) <= 3e-7 * (1 + 300 / T) * q, q, 0)
    return norm(near) + float(near.sum()) * norm(q)


def transform_slack(case: Case, z, v, g, gv, D) -> tuple[float, float]:
    """Transformed logits are rounded (twice, a tanh by 2 units): they move by 3 units of their size, and D by
    its gradients times that."""
    T = 1.0 if math.isinf(case.temperature) else case.temperature
    sizes = [np.where(x > x.max() - DEEPEST * T, np.abs(finite(x)), 0) for x in (z, v)]
    share, most = 3 * unit(case) / T, sum(float(x.max()) for x in sizes)
    moved = sum(float(np.abs(finite(s * d)).sum()) for s, d in zip(sizes, (g, gv), strict=True))
    kind, a, power = oracle.member(case.divergence)
    # an order multiplies the logits in the exponents of w
    a = power.order if power else a
    order = max(1.0, abs(a), abs(1 - a)) if power or kind.endswith("renyi") else 1.0
    order = order if math.isfinite(order) else 1.0
    return share * moved + (share * most) ** 2, share * most * order * (1 + float(D))


def hard_row(case: Case, z, label: int):
    """(CE, the hard term, its gradient, what is allowed of both). z less the label's, an exponent, is
    rounded: 6e-8 times it, relative (test_functional.py, `test_hard_term_keeps_its_digits`). Smoothing and
    z-loss have a log-sum-exp and a mean rounded at their size."""
    eps, more = case.get("label_smoothing", 0.0), case.get("z_loss", 0.0)
    if broken(z):
        return NAN, NAN, np.full(len(z), NAN), 0.0, 0.0
    here, log_q = ~np.isneginf(z), log_softmax(z, 1.0)
    q, log_sum, value = np.exp(log_q), z.max() - log_q.max(), -log_q[label]
    g = q.copy()
    g[label] = -np.delete(q, label).sum()
    term = (1 - eps) * value + (eps * (log_sum - z[here].mean()) if eps else 0) + more * log_sum**2
    grad = (1 - eps) * g + eps * (q - here / here.sum()) + 2 * more * log_sum * q
    relative = 1e-9 if is_double(case) else 1e-6 + 6e-8 * (depth(z, 1.0) + 20)
    rounding = 4 * unit(case) * abs(log_sum)
    room = (
        relative * finite(value)
        + eps * (rounding + 4 * unit(case) * abs(z[here]).max())
        + 2 * more * rounding * abs(log_sum)
        + FLUSHED
    )
    room_g = relative * (norm(g) + eps + 2 * more * abs(log_sum))
    if any(case.get(f"{who}_transform") for who in SIDES):
        moved = 3 * unit(case) * float(np.where(z > z.max() - DEEPEST, np.abs(finite(z)), 0).max())
        room, room_g = room + moved * (2 + 2 * more * abs(log_sum)), room_g + moved * (2 + 2 * more)
    return value, term, grad, room, room_g


# ---------------------------------------------------------------- losses


def soft_scales(case: Case) -> tuple[LD, LD]:
    """Factors of D and of T dD/dz."""
    T = case.temperature
    scale = LD(case.get("soft_weight", 1.0))
    if math.isinf(T):
        return scale, scale
    scale = scale * LD(T) ** 2 if case.get("t_squared") else scale
    return scale, scale / T


def of_loss(case: Case, found: dict, engine: str) -> Iterator[tuple]:
    """Value, statistics and gradients of fused_kd_loss, logit_matching_loss and fused_linear_kd_loss."""
    name, w, hard = case.divergence, weights(case), LD(case.get("hard_weight", 0.0))
    (zs, slopes), (vs, slopes_v) = transformed(case, 0), transformed(case, 1)
    steep = [how.scale if (how := case.get(f"{who}_transform")) else 1.0 for who in SIDES]
    transforms = any(case.get(f"{who}_transform") for who in SIDES)
    rounding = 6 * unit(case) * transforms  # of a slope, made of what has been rounded
    factor, denominator = factors(case, w)
    factor = np.broadcast_to(factor, w.shape)
    values, room = np.zeros(case.rows, LD), np.zeros(case.rows, LD)
    grads, rooms, stats = np.zeros((2, *zs.shape), LD), np.zeros((2, case.rows), LD), [None] * case.rows
    for i in np.flatnonzero(w):
        z, v, f, at = zs[i], vs[i], factor[i], case.at(i)
        scale, in_grad = soft_scales(at)
        D, g = soft_row(z, v, name, T := at.temperature, engine)
        wanted = (case.get("teacher_grad") or transforms) and np.isfinite(D)
        gv = teacher_row(z, v, name, T, engine) if wanted else np.zeros_like(g)
        room_D, room_z = soft_bounds(case, i, z, v, D, norm(g))
        room_g = [room_z, soft_bounds(case, i, z, v, D, norm(gv), True)[1]]
        if transforms and np.isfinite(D):
            more, in_g = transform_slack(at, z, v, g, gv, D)
            room_D, room_g = room_D + more, [x + in_g for x in room_g]
        elif np.array_equal(z, v) and not name.startswith("cross_entropy"):
            room_D, room_g = 0.0, [0.0, 0.0]  # a student that is the teacher has a loss and a gradient of 0
        if scale != 0:
            values[i] += w[i] * scale * D
            room[i] += abs(w[i] * scale) * room_D
            for side, (part, slope) in enumerate(((g, slopes[i]), (gv, slopes_v[i]))):
                grads[side, i] += f * in_grad * part * slope
                rooms[side, i] += abs(f * in_grad) * steep[side] * (room_g[side] + rounding * norm(part))
            if not np.isfinite(D):
                rooms[1, i] = INF  # the teacher's gradient is then one thing or another
                if D == INF and not np.isneginf([z, v]).any():
                    rooms[0, i] = INF  # beyond a long double
        ce = None
        if hard != 0:
            *ce, gh, room_ce, room_gh = hard_row(case, z, case.labels[i])
            values[i] += w[i] * hard * ce[1]
            room[i] += abs(w[i] * hard) * room_ce
            grads[0, i] += f * hard * gh * slopes[i]
            rooms[0, i] += abs(f * hard) * steep[0] * (room_gh + rounding * norm(gh))
            ce = ce[0], room_ce
        stats[i] = z, v, (D, room_D), ce
    yield value(case, found, values, room, denominator)
    if case.get("return_stats"):
        yield from of_stats(case, found["stats"], stats)
    if case.call == "fused_linear_kd_loss":
        yield from of_products(case, found, grads, rooms)
        return
    for side, tensor in enumerate("zv" if case.get("teacher_grad") else "z"):
        # the rounding as the gradient is made, and once more where the backward multiplies it
        once = case.per_row or ("fp16" not in case.dtypes and abs(math.frexp(case.upstream[0])[0]) == 0.5)
        yield from of_gradient(
            case,
            found[tensor],
            side,
            grads[side],
            rooms[side],
            (1 if once else 2) * cast(dtype_of(case, side), grads[side]),
        )


def dtype_of(case: Case, side: int) -> torch.dtype:
    return DTYPES[case.dtypes[side]]


def value(case: Case, found: dict, rows, room, denominator) -> tuple:
    right = rows if case.per_row else rows.sum(keepdims=True) / denominator
    return (
        "value",
        found["loss"],
        right,
        (room if case.per_row else room.sum(keepdims=True) / denominator)
        + unit(case) * np.abs(right)
        + 1.5e-45,
    )


def of_gradient(case: Case, x: torch.Tensor, side: int, right, room, roundings) -> Iterator[tuple]:
    """As tests/test_accuracy.py: the error's norm in a row; where the gradient is rounded to 16 bits, a
    class's error and its rounding."""
    name, whole = "zv"[side], gradient(case, x, side)
    if whole[:, case.vocab :].count_nonzero():
        yield f"{name}.grad of classes that do not count", whole[:, case.vocab :], LD(0), LD(0)
    if x.dtype.itemsize == 2:
        yield f"{name}.grad", whole[:, : case.vocab], right, room[:, None] + roundings
    else:
        yield (
            f"{name}.grad",
            whole[:, : case.vocab],
            right,
            room + np.sqrt((roundings * roundings).sum(-1)),
            True,
        )


def of_products(case: Case, found: dict, grads, rooms) -> Iterator[tuple]:
    """Of a head: dz @ w, dz.T @ h, the sum of dz. A 16-bit dz is rounded up to three times (as it is made,
    narrowed, and multiplied by the upstream gradient), sums once an addend, and the result in its dtype."""
    for side, prefix in enumerate(("", "t") if case.get("teacher_grad") and "th" in case.tensors else ("",)):
        dtype, dz = dtype_of(case, side), grads[side]
        if not (np.abs(dz) < torch.finfo(dtype).max).all() or not np.isfinite(rooms[side]).all():
            continue  # what inf - inf and 0 * inf make of a sum is not the loss's
        x = {
            n: rounded(case.tensors[prefix + n], case.dtypes[side])
            for n in "hwb"
            if prefix + n in case.tensors
        }
        room = (
            rooms[side][:, None]
            + 3 * cast(dtype, dz)
            + (3 + dz.size + x["w"].shape[1]) * unit(case) * np.abs(dz)
        )
        h, w = np.abs(x["h"]), np.abs(x["w"])
        right = dict(h=(dz @ x["w"], room @ w), w=(dz.T @ x["h"], room.T @ h), b=(dz.sum(0), room.sum(0)))
        for n in x:
            tensor, (exact, allowed) = found[prefix + n], right[n]
            g = tensor.grad[: case.vocab] if prefix + n in PER_CLASS else gradient(case, tensor, side)
            yield f"{prefix}{n}.grad", g, exact, allowed + cast(dtype, exact)
            if prefix + n in PER_CLASS and tensor.grad[case.vocab :].any():
                yield (
                    f"{prefix}{n}.grad of classes that do not count",
                    tensor.grad[case.vocab :],
                    LD(0),
                    LD(0),
                )


def of_stats(case: Case, stats, rows: list) -> Iterator[tuple]:
    """Divergence and cross entropy as in the value. A log-sum-exp or an entropy is
    a sum of logarithms as deep as the row. Of classes that a transform makes equal the top-1 may be any."""
    counts = [x is not None for x in rows]
    yield "stats.mask", stats.mask.float(), np.array(counts, LD), LD(0)
    yield "stats.counted", stats.counted.float(), LD(sum(counts)), LD(0)
    there = [stats.cross_entropy is not None, stats.correct is not None]
    yield (
        "stats: fields",
        torch.tensor(there).float(),
        np.array([bool(case.get("hard_weight")), case.labels is not None], LD),
        LD(0),
    )
    for i, row in enumerate(rows):
        expected = dict(divergence=(NAN, 0.0), agree=(LD(0), 0.0), correct=(LD(0), 0.0)) | {
            f"{who}_top1": (LD(-1), 0.0) for who in SIDES
        }
        expected |= {f"{who}_{x}": (NAN, 0.0) for who in SIDES for x in ("logsumexp", "entropy")}
        if row is not None and not broken(*row[:2]):
            *sides, expected["divergence"], ce = row
            tops = [int(getattr(stats, f"{who}_top1").reshape(-1)[i]) for who in SIDES]
            T = case.at(i).temperature
            for who, x, top in zip(SIDES, sides, tops, strict=True):
                log_p = log_softmax(x, T)
                sums = dict(
                    logsumexp=(x.max() / LD(T) if T < math.inf else 0) - log_p.max(),
                    entropy=-(np.exp(log_p) * finite(log_p)).sum(),
                )
                expected |= {
                    f"{who}_{n}": (y, 3e-6 * abs(y) + 1e-6 + 2e-7 * depth(x, T)) for n, y in sums.items()
                }
                as_good = (
                    case.get(f"{who}_transform")
                    and 0 <= top < len(x)
                    and x.max() - x[top] <= 4 * unit(case) * abs(x.max())
                )
                expected[f"{who}_top1"] = LD(top if as_good else np.argmax(x)), 0.0
            expected["agree"] = LD(tops[0] == tops[1]), 0.0
            expected["correct"] = LD(case.labels is not None and tops[0] == case.labels[i]), 0.0
            if ce:
                expected["cross_entropy"] = ce
        for name, (right, room) in expected.items():
            if getattr(stats, name) is not None:
                found = getattr(stats, name).reshape(-1)[i : i + 1]
                yield (
                    f"stats.{name}[{i}]",
                    found.float() if name == "agree" else found,
                    right,
                    room + unit(case) * abs(finite(right)) + 1.5e-45,
                )


def of_decoupled(case: Case, found: dict, engine: str) -> Iterator[tuple]:
    """The two parts with their weights as documented. Each pass has the bounds of KL and a rounded gradient,
    and the weight of the second comes of logarithms in the teacher's fp32."""
    T, w = LD(case.temperature), weights(case)
    target, rest = LD(case.get("target_weight", 1.0)), LD(case.get("non_target_weight", 8.0))
    scale, hard = T**2 if case.get("t_squared", True) else LD(1), LD(case.get("hard_weight", 1.0))
    zs, vs, dtype = logits(case, 0), logits(case, 1), dtype_of(case, 0)
    factor, denominator = factors(case, w)
    factor = np.broadcast_to(factor, w.shape)
    values, room, room_g = (np.zeros(case.rows, LD) for _ in range(3))
    grad, roundings = np.zeros(zs.shape, LD), np.zeros(zs.shape, LD)
    for i in np.flatnonzero(w):
        z, v, f, others = zs[i], vs[i], factor[i], np.arange(case.vocab) != case.labels[i]
        z_rest, v_rest = (np.where(others, x, -INF) for x in (z, v))
        D, g = soft_row(z, v, "kl", float(T), engine)
        N, n = soft_row(z_rest, v_rest, "kl", float(T), engine)
        if not broken(z, v) and (
            broken(z_rest, v_rest) or max(np.abs(finite(x)).max() for x in (z, v)) > 1e36
        ):
            room[i] = room_g[i] = INF  # no other class, or parts that fp32 cannot hold
            continue
        outside = NAN if broken(z, v) else -np.expm1(log_softmax(v, float(T))[case.labels[i]])
        ce, _, gh, room_ce, room_gh = hard_row(case, z, case.labels[i])
        weight = rest - target * outside
        parts = (scale * target, D), (scale * weight, N), (hard, ce)
        values[i] = w[i] * sum(x * y for x, y in parts if x != 0)
        grad[i] = f * (scale / T * (target * g + weight * n) + hard * gh)
        off = 16 * (1e-12 if case.dtypes[1] == "fp64" else 6e-8) * abs(target * outside)
        (room_D, room_d), (room_N, room_n) = (
            soft_bounds(case, i, *x) for x in ((z, v, D, norm(g)), (z_rest, v_rest, N, norm(n)))
        )
        room[i] = w[i] * (
            scale * (abs(target) * room_D + abs(weight) * room_N + off * finite(N)) + abs(hard) * room_ce
        )
        room[i] += 3 * unit(case) * w[i] * sum(abs(x) * finite(y) for x, y in parts)
        room_g[i] = abs(f) * (
            scale / T * (abs(target) * room_d + abs(weight) * room_n + off * norm(n)) + abs(hard) * room_gh
        )
        pieces = scale / T * weight * n, scale / T * np.abs(target * g) + np.abs(hard * gh)
        roundings[i] = sum(2 * cast(dtype, f * x) for x in pieces) + cast(dtype, grad[i])
    yield value(case, found, values, room, denominator)
    yield from of_gradient(case, found["z"], 0, grad, room_g, roundings)


# ---------------------------------------------------------------- what gives no loss


def of_log_softmax(case: Case, found: dict, engine: str) -> Iterator[tuple]:
    """The bounds of test_functional.py: near 0 a value is the sum of the others, whose exponents are
    rounded."""
    x, u, T = logits(case, 0), rounded(case.tensors["u"], case.dtypes[0]), case.get("temperature", 1.0)
    out, g, room, room_g = (np.full(x.shape, NAN) for _ in range(4))
    for i, row in enumerate(x):
        if broken(row):
            g[i] = NAN if T < math.inf else 0
            room_g[i] = 0
            continue
        out[i] = log_softmax(row, T)
        p, size = np.exp(out[i]), np.abs(finite(out[i]))
        g[i] = (u[i] - p * u[i].sum()) / LD(T)
        deep = min(40 / T, DEEPEST) + depth(row, T) + 5
        room[i] = np.where(size < 0.1, deep, 5) * unit(case) * size + FLUSHED
        room_g[i] = 16 * unit(case) * (norm(g[i]) + len(row) ** 0.5 * p.max() / T * (1 + np.abs(u[i]).sum()))
    yield "output", found["loss"], out, room + cast(found["loss"].dtype, out)
    yield "z.grad", gradient(case, found["z"], 0), g, room_g + 2 * cast(dtype_of(case, 0), g)


def of_standardize(case: Case, found: dict, engine: str) -> Iterator[tuple]:
    """The mean is rounded at the logits' size, and so are the differences from it. Of a broken row nothing is
    promised."""
    x, u = logits(case, 0), rounded(case.tensors["u"], case.dtypes[0])
    out, g = np.zeros(x.shape, LD), np.zeros(x.shape, LD)
    room, room_g = np.full(x.shape, INF), np.full(x.shape, INF)
    for i, row in enumerate(x):
        if broken(row):
            continue
        here, n = ~np.isneginf(row), (~np.isneginf(row)).sum()
        d, du = np.where(here, row - row[here].mean(), 0), np.where(here, u[i], 0)
        std = np.sqrt((d * d).sum() / n)
        near = std + LD(1e-7)
        out[i] = np.where(here, d / near, row)
        of_std = (du * d).sum() / near**2 * (d / (n * std) if std else 0)
        g[i] = np.where(here, (du - du.sum() / n) / near - of_std, 0)
        share = (4 + len(row)) * unit(case) * (1 + np.abs(finite(row)).max() / near)
        room[i] = share * (1 + np.abs(finite(out[i])))
        room_g[i] = share * np.abs(u[i]).sum() * (2 + np.abs(finite(out[i])).max() ** 2) / near
    yield "output", found["loss"], out, room
    yield "z.grad", gradient(case, found["z"], 0), g, room_g + 2 * cast(dtype_of(case, 0), g)


CHECKS = {
    "tempered_log_softmax": of_log_softmax,
    "standardize_logits": of_standardize,
    "decoupled_kd_loss": of_decoupled,
}

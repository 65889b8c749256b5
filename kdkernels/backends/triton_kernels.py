"""The Triton kernels: a row in two sweeps by one program or by several, or from registers; log-softmax.

A row is its base b (the teacher, or the student for orders up to 1/2: the smaller tilt) and the other
distribution o. Relative to references M, an integer near the largest b c, and K, near the mean of (o - b)/T,
with k = 1/T and c = k log2(e),

    e = 2^{b c - M}    y = (o - b) k - K    eo = e e^y = w 2^{o c - M - N}    with an integer N near K
                       log2(e), and w what N lacks

and em = eo - e, et = e (e^{tilt y} - 1) and the terms of F come out of divergence.py to their own digits.
Each of b c - M, o c - M - N and y is one fused multiply-add: nothing is rounded before it is small, however
large the logits. The first sweep sums e, eo, em and et: what K still lacks is h = log(sum eo / sum e), from
em where it is small. The second sweep, backwards, from the cache where the row still is, has K + h for a
reference, so that y = log o - log b; it sums the terms of F, all of one sign, and writes the gradient, which
is linear in em, et and e. Without a gradient the first sweep sums the terms of F as well, and the second runs
only where they would cancel. A row of few classes whose K was far from the mark, or whose R is far from 1,
has its first sweep repeated with K + h (`poor`).

Reverse KL is KL seen from the student: the first sweep sums its terms, and e y too, and the gradient e (A y +
C) is the second's. The mixture family and TVD are not linear in what K lacks: with h from a first sweep, a
second sums D and the mean of xi, and a third writes the gradient q (xi - mean). The weights and l of a
mixture are numbers of the call; `tilt` is l there.

Where a model scales or caps its logits, that is done to each as it is read, in every sweep, in fp32, so that
b and o above are what a model would have given in fp32; the second sweep has the derivative from the same
exponential. All that is left of a hard term with label smoothing and z-loss are two more sums of the first
sweep and scalars of the row. Statistics (stats.py) are sums of the first sweep too; of the largest logit a
lane keeps the tile that had it, and the class is looked for in that tile's run afterwards.

A class at -inf has e or eo = 0 and needs no test; tails are such classes. What is out of a float's range
(differences of 88 nats, nan, +inf) shows as a sum that is not finite: the row's loss is left `lost`, and
triton_careful.py computes it.

Sums are fp32 in lanes (R classes to a lane and tile), then fp64, as are the scalars of a row. A tile is [RB,
R]: R classes to a 16-byte access, so that what is taken along R stays in a thread.
"""

from __future__ import annotations

import types

import triton
import triton.language as tl

from .. import divergence as math_of
from .. import stats
from . import triton_plan


def _jit(f):
    """A plain function as a device function; triton looks for its language among the globals."""
    return triton.jit(types.FunctionType(f.__code__, {"tl": tl, "__name__": __name__}, f.__name__))


kl_terms, power_terms, mixture_term, mixture_slope = (
    _jit(f) for f in (math_of.kl_terms, math_of.power_terms, math_of.mixture_term, math_of.mixture_slope)
)
psi_short, psi_series, log_short = (
    _jit(f) for f in (math_of.psi_short, math_of.psi_series, math_of.log_short)
)


@triton.jit
def magnitude(x):
    return tl.abs(x)


@triton.jit
def select(condition, x, y):
    return tl.where(condition, x, y)


KL, ENTROPY, MOMENTS, MIXTURE, SKEWED, TVD, POWER, ALPHA, SUPPORT, EXTREME = (
    tl.constexpr(i) for i in range(len(triton_plan.FAMILIES))
)
STUDENT = tl.constexpr(triton_plan.STUDENT)
EVEN, WINDOW, SCALAR = (tl.constexpr(x) for x in (triton_plan.EVEN, triton_plan.WINDOW, triton_plan.SCALAR))
AGAIN, MIX, FINISH, BOTH = (
    tl.constexpr(x) for x in (triton_plan.AGAIN, triton_plan.MIX, triton_plan.FINISH, triton_plan.BOTH)
)
SMOOTHED, SCALED, CAPPED = (
    tl.constexpr(x) for x in (triton_plan.SMOOTHED, triton_plan.SCALED, triton_plan.CAPPED)
)
SUM_SLOTS, SLOTS = tl.constexpr(triton_plan.SUM_SLOTS), tl.constexpr(triton_plan.SLOTS)
COLUMNS = tl.constexpr(stats.COLUMNS)
# compiled for any value
NUMBERS = [
    "rows",
    "inner",
    "z_outer",
    "z_inner",
    "v_outer",
    "v_inner",
    "g_outer",
    "g_inner",
    "vocab",
    "width",
]
# a number of each: where they begin, as of labels[1:], makes no other kernel
ROWS_DATA = ["LABELS", "WEIGHTS", "LOSS"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E_SINGLE = tl.constexpr(1.4426950216293335)  # as fp32 has it
MOST = tl.constexpr(8e6)  # integers up to here, and their sums, are floats
INF = tl.constexpr(float("inf"))
LOW = tl.constexpr(-1e30)  # a finite top of what has no class yet
BIG = tl.constexpr(1e36)
REACH = tl.constexpr(80.0)  # of an exponent whose exponential still has company in a float
ROOT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
NOWHERE = tl.constexpr(1 << 30)  # a class or a tile beyond all
LOST = tl.constexpr(0x7FF8_10_57_0000_0000)


# ---------------------------------------------------------------- scalars of a row, fp64


@triton.jit
def wide(x):
    return tl.full([], 0.0, tl.float64) + x


@triton.jit
def long(x):
    """An index that offsets beyond 2^31 are made of."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def finite(x):
    return tl.abs(x) < INF


@triton.jit
def log1p64(x):
    """log(1 + x) to the last digits: the rounding of 1 + x divides out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def psi64(x):
    """e^x - 1 - x."""
    near = tl.abs(x) < 0.5
    return tl.where(near, psi_series(tl.where(near, x, 0.0)), (tl.exp(x) - 1.0) - x)


@triton.jit
def expm164(x):
    near = tl.abs(x) < 0.5
    small = tl.where(near, x, 0.0)
    return tl.where(near, small + psi_series(small), tl.exp(x) - 1.0)


@triton.jit
def total(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


# ---------------------------------------------------------------- families, when compiled


@triton.constexpr_function
def mixes(FAMILY):
    """Whether D is not made of sums that are linear in what K lacks: three sweeps."""
    return MIXTURE.value <= FAMILY <= TVD.value


@triton.constexpr_function
def reverses(FAMILY, BASE_Z):
    """Reverse KL: its value is KL's with the two exchanged, its gradient q (D - y)."""
    return FAMILY == KL.value and bool(BASE_Z)


@triton.constexpr_function
def splits(FAMILY, BASE_Z):
    """Whether what K rounds off counts in every sweep, as nothing later is linear in it."""
    return MIXTURE.value <= FAMILY <= TVD.value or FAMILY == KL.value and bool(BASE_Z)


@triton.constexpr_function
def first_has_terms(FAMILY, BASE_Z, GRAD):
    """Whether the first sweep sums the terms of F: a value alone, or one that the gradient asks for."""
    return reverses(FAMILY, BASE_Z) or not (GRAD or mixes(FAMILY))


# ---------------------------------------------------------------- logits as their models give them


@triton.jit
def side(X, scale, softcap, steepness, TRANSFORM: tl.constexpr):
    """The student or the teacher of a row: (pointer,), (pointer, scale) or (pointer, scale, -softcap, -2 /
    softcap), 0 where it has none.

    Its length is known when compiled, and says what is to be done.
    """
    if TRANSFORM == CAPPED:
        return X, scale, softcap, steepness
    elif TRANSFORM == SCALED:
        return X, scale
    else:
        return (X,)


@triton.jit
def transformed(x, X, psi: tl.constexpr):
    """(softcap tanh(scale x / softcap), its derivative over scale) of logits of a side; -inf, +inf and nan
    stay what they are.

    With e = e^{-2 u}, tanh u = (1 - e) / (1 + e) has the digits of small logits as 1 - e has them, and the
    derivative, 4 e / (1 + e)^2, those of large ones. The factors of the gradient have the scale already.
    """
    if len(X) == 1:
        return x, 1.0
    elif len(X) == 2:
        return x * X[1], 1.0
    else:
        x = x * X[1]
        w = tl.minimum(tl.maximum(x * X[3], -REACH), REACH)
        e = tl.exp(w)
        more = tl.where(tl.abs(w) < 0.5, w + psi(w), e - 1.0)
        share = 1.0 / (2.0 + more)
        return tl.where(finite(x) & (X[3] < 0.0), X[2] * (more * share), x), 4.0 * e * share * share


# ---------------------------------------------------------------- a tile of a row


@triton.jit
def load(X, at, edge, vocab, ACCESS: tl.constexpr, CACHE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr):
    """The classes of the tile that begins at place `at` of the row's window; class 0 is at place `edge`. -inf
    beyond the row."""
    run = at + tl.arange(0, RB)[:, None] * R
    cols = run + tl.arange(0, R)[None, :]
    if ACCESS == SCALAR:
        return tl.load(X + cols, mask=cols < vocab, other=-INF, eviction_policy=CACHE).to(tl.float32)
    else:
        # the mask is that of whole runs, which keeps the access whole; the 16 bytes that hold a class may be
        # read
        if X.dtype.element_ty == tl.bfloat16:
            # two to a word, each one instruction from being a float; compilers take two
            words = (at // 2) + tl.arange(0, RB)[:, None] * (R // 2) + tl.arange(0, R // 2)[None, :]
            W = X.to(tl.pointer_type(tl.int32), bitcast=True)
            # -inf, -inf
            pairs = tl.load(W + words, mask=run < edge + vocab, other=-8323200, eviction_policy=CACHE)
            x = tl.join(
                (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            ).reshape([RB, R])
        else:
            x = tl.load(X + cols, mask=run < edge + vocab, other=-INF, eviction_policy=CACHE).to(tl.float32)
        if ACCESS == WINDOW:
            x = tl.where((cols >= edge) & (cols < edge + vocab), x, -INF)
        return x


@triton.jit
def store(G, at, edge, vocab, g, ACCESS: tl.constexpr, RB: tl.constexpr, R: tl.constexpr):
    run = at + tl.arange(0, RB)[:, None] * R
    cols = run + tl.arange(0, R)[None, :]
    g = g.to(G.dtype.element_ty)
    inside = (cols >= edge) & (cols < edge + vocab)
    if ACCESS == SCALAR:
        tl.store(G + cols, g, mask=inside, eviction_policy="evict_first")
    elif ACCESS == EVEN:
        tl.store(G + cols, g, mask=run < edge + vocab, eviction_policy="evict_first")
    else:
        full = (run >= edge) & (run + R <= edge + vocab)
        tl.store(G + cols, g, mask=full, eviction_policy="evict_first")
        if (at < edge) | (at + RB * R > edge + vocab):
            tl.store(G + cols, g, mask=inside & (full == 0))


@triton.jit
def pair(
    BASE, OTHER, b0, o0, at, edge, vocab,
    ACCESS: tl.constexpr, CACHE: tl.constexpr, WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """(b, o, the slopes of their transforms) of a tile; the one tile of a WHOLE row is in registers already,
    as it was loaded."""
    if not WHOLE:
        b0, o0 = (
            load(BASE[0], at, edge, vocab, ACCESS, CACHE, RB, R),
            load(OTHER[0], at, edge, vocab, ACCESS, CACHE, RB, R),
        )
    b, slope_b = transformed(b0, BASE, psi_short)
    o, slope_o = transformed(o0, OTHER, psi_short)
    return b, o, slope_b, slope_o


@triton.jit
def scaled_difference(b, o, k, K, K_low, CARRY: tl.constexpr, WHOLLY: tl.constexpr):
    """(o - b) k - K; fp32 logits carry the rounding of o - b, which a common offset would make larger than
    what is left.

    K_low counts then, and where what is left is not linear in the gradient: WHOLLY.
    """
    hi = o - b
    if CARRY:
        back = hi - o
        lo = (o - (hi - back)) - (b + back)
        return tl.fma(tl.where(lo == lo, lo, 0.0), k, tl.fma(hi, k, -K) - K_low)
    elif WHOLLY:
        return tl.fma(hi, k, -K) - K_low
    else:
        return tl.fma(hi, k, -K)


@triton.jit
def terms(
    b, o, a, e, eo, top, k, K, K_low, tilt, inverse_tilt,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, VALUE: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """(e, em, et, eu, the term of F) of a tile, a the exponent of e in base 2 and eu = e e^{tilt y}; the term
    only where VALUE.

    Of reverse KL et is e y.
    """
    y = scaled_difference(b, o, k, K, K_low, CARRY, splits(FAMILY, BASE_Z))
    if FAMILY == MOMENTS:
        both = finite(y)
        y = tl.where(both, y, 0.0)
        # masks that differ; order 0 asks only whose support it is
        lone = ((b == -INF) & (o > -INF)) | ((tilt != 0.0) & (o == -INF) & (b > -INF))
        e = tl.where(both, 1.0, 0.0)
        return e, y, y, e, tl.where(lone, INF, 0.5 * y * y)
    else:
        if VALUE or FAMILY >= POWER or reverses(FAMILY, BASE_Z):
            y = tl.minimum(y, BIG)  # +inf, and the nan of a class that neither has; e is 0 there
        if FAMILY >= POWER:
            eu = tl.math.exp2(tl.fma(y, tilt * LOG2E, a))
            em, et, term = power_terms(
                e, eo, eu, y, tilt, inverse_tilt, psi_short, magnitude, select, BASE_Z == STUDENT
            )
            return e, em, et, eu, term
        else:
            em, term = kl_terms(e, eo, y, psi_short, magnitude, select)
            return e, em, e * y if reverses(FAMILY, BASE_Z) else em, e, term


@triton.jit
def sample(
    BASE, OTHER, b0, o0, edge, vocab, c, k,
    FAMILY: tl.constexpr, CENTERED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(top, K, largest o) from 16 runs of 32 classes, or from all: the largest b, and the mean of (o - b) k
    under e."""
    if not WHOLE:
        cols = tl.arange(0, 16)[:, None] * (vocab // 16) + tl.arange(0, 32)[None, :]
        b0 = tl.load(BASE[0] + edge + cols, mask=cols < vocab, other=-INF).to(tl.float32)
        o0 = tl.load(OTHER[0] + edge + cols, mask=cols < vocab, other=-INF).to(tl.float32)
    b = transformed(b0, BASE, psi_short)[0]
    o = transformed(o0, OTHER, psi_short)[0]
    top = tl.maximum(tl.max(tl.max(b, 1), 0), LOW)
    y = (o - b) * k
    both = finite(y)
    e = tl.where(both, 1.0 if FAMILY == MOMENTS else tl.math.exp2((b - top) * c), 0.0)
    s = tl.sum(tl.sum(e, 1), 0)
    K = tl.sum(tl.sum(tl.where(both, e * y, 0.0), 1), 0) / tl.where(s > 0.0, s, 1.0)
    return top, tl.where(finite(K) & CENTERED, K, 0.0), tl.maximum(tl.max(tl.max(o, 1), 0), LOW)


@triton.jit
def exponent_shift(K, K_low, c, k):
    """(N, w): K (+ K_low) in base 2 as an integer, and e^K 2^-N. The scale of logits is c, so that is what K
    is brought to."""
    x = (wide(K) + K_low) / k * c
    N = tl.floor(x + 0.5)
    return N.to(tl.float32), tl.exp((N - x) / LOG2E).to(tl.float32)


# ---------------------------------------------------------------- the two sweeps over (a part of) a row


@triton.jit
def last_tile(first, last, TILE: tl.constexpr):
    return first + (last - 1 - first) // TILE * TILE


@triton.jit
def interior(first, last, final, ACCESS: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """The tiles between the first and the last, which of a window need no mask: the others have a loop of
    their own, in every layout but the even one, so that layouts add in the same order."""
    if ACCESS != EVEN and not WHOLE:
        return first + TILE, final
    else:
        return first, last


@triton.jit
def first_tile(
    at, top, top_o, M, M_o, s, so, d, p, u, hard, f, told, BASE, OTHER, b0, o0, edge, vocab, label, top0, K,
    K_low, N, w, hard_M, c, k,
    tilt, inverse_tilt,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, VALUE: tl.constexpr, TELL: tl.constexpr,
    CARRY: tl.constexpr,
    ACCESS: tl.constexpr, WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The lanes' sums with the tile at `at` added, and the references they are relative to."""
    b, o, _, _ = pair(BASE, OTHER, b0, o0, at, edge, vocab, ACCESS, "evict_last", WHOLE, RB, R)
    a, e, eo = b, b, o
    if TELL:
        moved, moved_o, best, best_o, run, run_o = told
        best, run = first_largest(best, run, b, at)
        best_o, run_o = first_largest(best_o, run_o, o, at)
        if FAMILY == MOMENTS:
            moved += tl.sum((b > -INF).to(tl.float32), 1)
            moved_o += tl.sum((o > -INF).to(tl.float32), 1)
    if FAMILY != MOMENTS:
        top, top_o = tl.maximum(top, tl.max(b, 1)), tl.maximum(top_o, tl.max(o, 1))
        new, new_o = tl.ceil(top * c), tl.ceil(top_o * c)
        scale, scale_o = tl.math.exp2(M - new), tl.math.exp2(M_o - new_o)  # powers of 2
        if TELL:
            moved, moved_o = scale * (moved + (M - new) * s), scale_o * (moved_o + (M_o - new_o) * so)
        M, M_o = new, new_o
        s, d, p, u, f = s * scale, d * scale, p * scale, u * scale, f * scale
        a = tl.fma(b, c, -M[:, None])
        # o has a largest of its own here: where K is far from h, the sum of eo would be one of rounded
        # exponents
        a_o = tl.fma(o, c, -M_o[:, None])
        e, eo = tl.math.exp2(a), tl.math.exp2(a_o)
        so = so * scale_o + tl.sum(eo, 1)
        if TELL:
            moved += tl.sum(e * tl.maximum(a, -BIG), 1)
            moved_o += tl.sum(eo * tl.maximum(a_o, -BIG), 1)
        eo *= (tl.math.exp2(M_o - M - N) * w)[:, None]
    e, em, et, eu, term = terms(
        b,
        o,
        a,
        e,
        eo,
        top0,
        k,
        K,
        K_low if splits(FAMILY, BASE_Z) else 0.0,
        tilt,
        inverse_tilt,
        FAMILY,
        BASE_Z,
        VALUE,
        CARRY,
    )
    s += tl.sum(e, 1)
    d += tl.sum(em, 1)
    if FAMILY >= POWER or reverses(FAMILY, BASE_Z):
        p += tl.sum(et, 1)
    if FAMILY >= POWER:
        u += tl.sum(eu, 1)
    if VALUE:
        f += tl.sum(term, 1)
    if HARD:
        cols = at + tl.arange(0, RB)[:, None] * R + tl.arange(0, R)[None, :]
        z = b if BASE_Z else o
        others, exponents, classes = hard
        x = tl.fma(z, LOG2E_SINGLE, -hard_M)
        others += tl.sum(tl.where(cols == edge + label, 0.0, tl.math.exp2(x)), 1)
        if HARD == SMOOTHED:
            exponents += tl.sum(tl.where(z > -INF, x, 0.0), 1)
            classes += tl.sum(tl.where(z > -INF, 1.0, 0.0), 1)
        hard = others, exponents, classes
    if TELL:
        told = moved, moved_o, best, best_o, run, run_o
    return top, top_o, M, M_o, s, so, d, p, u, hard, f, told


@triton.jit
def first_largest(best, run, x, at):
    """(the largest logit of each lane, the tile that has it first) with the tile at `at` added; tiles come in
    any order."""
    new = tl.max(x, 1)
    return tl.maximum(best, new), tl.where((new > best) | ((new == best) & (at < run)), at, run)


@triton.jit
def first_class(X, best, run, edge, vocab, RB: tl.constexpr, R: tl.constexpr):
    """The first class with the largest logit: of the first run that has it, which is read again."""
    largest = tl.max(best, 0)
    cols = tl.min(tl.where(best == largest, run + tl.arange(0, RB) * R, NOWHERE), 0) + tl.arange(0, R)
    x = tl.load(X[0] + cols, mask=(cols >= edge) & (cols < edge + vocab), other=-INF).to(tl.float32)
    x = transformed(x, X, psi_short)[0]
    return wide(largest), wide(tl.min(tl.where(x == tl.max(x, 0), cols, NOWHERE), 0) - edge)


@triton.jit
def first_sweep(
    BASE, OTHER, b0, o0, first, last, edge, vocab, label, top0, top_o0, K, K_low, hard_M, c, k, tilt,
    inverse_tilt,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, VALUE: tl.constexpr, TELL: tl.constexpr,
    CARRY: tl.constexpr,
    ACCESS: tl.constexpr, WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """(largest b, largest o, sums of e, eo, em, et, eu, the hard term's, the terms of F, for statistics).

    All but the hard term's are over 2^M of the largest b. Those are of its e over the classes but the label,
    and, for label smoothing, of its exponents over the classes that are not masked, and how many they are.
    Statistics take sums of e b c and eo o c (at T = inf: how many classes are not masked), and of each side
    the largest logit and the first class that has it.
    """
    N, w = exponent_shift(K, K_low, c, k)
    top = tl.full([RB], 0.0, tl.float32) + top0
    top_o = tl.full([RB], 0.0, tl.float32) + top_o0
    M, M_o = tl.ceil(top * c), tl.ceil(top_o * c)
    s = tl.zeros([RB], tl.float32)
    so, d, p, u, hard, f = s, s, s, s, (s, s, s), s
    nowhere = tl.full([RB], NOWHERE, tl.int32)
    told = s, s, s - INF, s - INF, nowhere, nowhere
    final = last_tile(first, last, RB * R)
    inner, end = interior(first, last, final, ACCESS, WHOLE, RB * R)
    for at in tl.range(inner, end, RB * R):
        top, top_o, M, M_o, s, so, d, p, u, hard, f, told = first_tile(
            at, top, top_o, M, M_o, s, so, d, p, u, hard, f, told, BASE, OTHER, b0, o0, edge, vocab, label,
            top0, K, K_low, N, w, hard_M,
            c, k, tilt, inverse_tilt,
            FAMILY, BASE_Z, HARD, VALUE, TELL, CARRY, EVEN if ACCESS == WINDOW and not WHOLE else ACCESS,
            WHOLE, RB, R,
        )  # fmt: skip
    if ACCESS != EVEN and not WHOLE:
        for at in tl.range(first, last, tl.maximum(final - first, RB * R)):
            top, top_o, M, M_o, s, so, d, p, u, hard, f, told = first_tile(
                at, top, top_o, M, M_o, s, so, d, p, u, hard, f, told, BASE, OTHER, b0, o0, edge, vocab,
                label, top0, K, K_low, N, w,
                hard_M, c, k, tilt, inverse_tilt, FAMILY, BASE_Z, HARD, VALUE, TELL, CARRY, ACCESS, WHOLE,
                RB, R,
            )  # fmt: skip
    largest, largest_o = tl.max(top, 0), tl.max(top_o, 0)
    unit = tl.full([RB], 1.0, tl.float32)
    unit_o = unit
    if FAMILY != MOMENTS:
        unit, unit_o = tl.math.exp2(M - tl.ceil(largest * c)), tl.math.exp2(M_o - tl.ceil(largest_o * c))
    so_over_e = tl.exp((wide(tl.ceil(largest_o * c)) - tl.ceil(largest * c) - N) / LOG2E) * w
    exponents, classes = wide(0.0), wide(0.0)
    if HARD == SMOOTHED:
        exponents, classes = total(hard[1]), total(hard[2])
    moved = wide(0.0)
    moved_o, best, best_o, place, place_o = moved, moved, moved, moved, moved
    if TELL:
        best, place = first_class(BASE, told[2], told[4], edge, vocab, RB, R)
        best_o, place_o = first_class(OTHER, told[3], told[5], edge, vocab, RB, R)
        moved, moved_o = total(told[0]), total(told[1])
        if FAMILY != MOMENTS:
            moved = tl.sum((told[0] + M.to(tl.float64) * s) * unit, 0)
            moved_o = tl.sum((told[1] + M_o.to(tl.float64) * so) * unit_o, 0) * so_over_e
    sum_p = total(p * unit)
    return (
        largest, largest_o, total(s * unit), total(so * unit_o) * so_over_e, total(d * unit), sum_p,
        total(u * unit),
        (total(hard[0]), exponents, classes), total(f * unit), (moved, moved_o, best, best_o, place, place_o),
    )  # fmt: skip


@triton.jit
def second_tile(
    at, d, f, others, ties, own, BASE, OTHER, G, b0, o0, edge, vocab, label, top, M, K, K_low, N, w, factors,
    direct, hard,
    c, k, tilt, inverse_tilt,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, GRAD: tl.constexpr, CARRY: tl.constexpr,
    ACCESS: tl.constexpr,
    WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The lanes' sums with the tile at `at` added; writes its gradient."""
    b, o, slope_b, slope_o = pair(BASE, OTHER, b0, o0, at, edge, vocab, ACCESS, "evict_first", WHOLE, RB, R)
    a = tl.fma(b, c, -M)
    e = tl.math.exp2(a)
    if reverses(FAMILY, BASE_Z) and GRAD:
        y = tl.minimum(scaled_difference(b, o, k, K, K_low, CARRY, True), BIG)
        em, et, eu = e, e * y, e
    else:
        eo = tl.math.exp2(tl.fma(o, c, -(M + N))) * w
        e, em, et, eu, term = terms(
            b, o, a, e, eo, top, k, K, K_low, tilt, inverse_tilt, FAMILY, BASE_Z, True, CARRY
        )
        d += tl.sum(et if FAMILY >= POWER and BASE_Z else em, 1)
        f += tl.sum(term, 1)
    if FAMILY == ENTROPY:
        others += tl.sum(tl.where(b == top, 0.0, e), 1)
        ties += tl.sum(tl.where(b == top, 1.0, 0.0), 1)
        own -= tl.sum(tl.where(e > 0.0, e * ((b - top) * c), 0.0), 1)
    if GRAD:
        z, slope = (b, slope_b) if BASE_Z else (o, slope_o)
        g = soft_gradient(b, o, e, em, et, eu, factors, direct, FAMILY, BASE_Z)
        g = with_hard(g, z, slope, at, edge + label, hard, len(BASE) > 2, HARD, RB, R)
        store(G, at, edge, vocab, g, ACCESS, RB, R)
    return d, f, others, ties, own


@triton.jit
def soft_gradient(b, o, e, em, et, eu, factors, direct, FAMILY: tl.constexpr, OF_BASE: tl.constexpr):
    """Of the divergence, in what the softmax of the base, or of the other, is of; `factors` as `coefficients`
    gives them."""
    A, P, C = factors
    if FAMILY >= POWER:
        et = tl.where(direct, eu, et)
    if OF_BASE:
        g = P * et + C * e
        # what is masked is not moved; others have 0 there at once
        return tl.where(b == -INF, 0.0, g) if FAMILY == KL else g
    else:
        g = A * em + C * e
        if FAMILY >= POWER:
            g += P * et
        return tl.where(o == -INF, 0.0, g)


@triton.jit
def with_hard(
    g,
    z,
    slope,
    at,
    label_at,
    hard,
    CURVED: tl.constexpr,
    HARD: tl.constexpr,
    RB: tl.constexpr,
    R: tl.constexpr,
):
    """The gradient of a tile, in what the softmax is of, with the hard term's (see `hard_of`), as one in the
    logits."""
    if HARD:
        M, factor, at_label, each = hard
        cols = at + tl.arange(0, RB)[:, None] * R + tl.arange(0, R)[None, :]
        x = factor * tl.math.exp2(tl.fma(z, LOG2E_SINGLE, -M))
        if HARD == SMOOTHED:
            x = tl.where(z > -INF, x - each, 0.0)
        g += tl.where(cols == label_at, at_label, x)
    if CURVED:
        g *= slope
    return g


@triton.jit
def second_sweep(
    BASE, OTHER, G, b0, o0, first, last, edge, vocab, label, top, K, K_low, factors, direct, hard, c, k,
    tilt, inverse_tilt,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, GRAD: tl.constexpr, CARRY: tl.constexpr,
    ACCESS: tl.constexpr,
    WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sums of em and of the terms of F; for the base's entropy: of e but the largest, how many are largest,
    of -e log2(e / the largest).

    Writes the gradients, with `factors` (A, P, C) for each: A em + P et + C e, or A em + P eu + C e, and the
    hard term's.
    """
    N, w = exponent_shift(K, K_low, c, k)
    M = tl.ceil(top * c)
    d = tl.zeros([RB], tl.float32)
    f, others, ties, own = d, d, d, d
    final = last_tile(first, last, RB * R)
    inner, end = interior(first, last, final, ACCESS, WHOLE, RB * R)
    from_end = last_tile(inner, end, RB * R)
    for forward in tl.range(inner, end, RB * R):
        d, f, others, ties, own = second_tile(
            from_end - (forward - inner), d, f, others, ties, own, BASE, OTHER, G, b0, o0, edge, vocab,
            label, top, M, K, K_low, N, w,
            factors, direct, hard, c, k, tilt, inverse_tilt,
            FAMILY, BASE_Z, HARD, GRAD, CARRY, EVEN if ACCESS == WINDOW and not WHOLE else ACCESS, WHOLE, RB,
            R,
        )  # fmt: skip
    if ACCESS != EVEN and not WHOLE:
        for at in tl.range(first, last, tl.maximum(final - first, RB * R)):
            d, f, others, ties, own = second_tile(
                at, d, f, others, ties, own, BASE, OTHER, G, b0, o0, edge, vocab, label, top, M, K, K_low, N,
                w, factors, direct,
                hard, c, k, tilt, inverse_tilt, FAMILY, BASE_Z, HARD, GRAD, CARRY, ACCESS, WHOLE, RB, R,
            )  # fmt: skip
    sum_d, sum_f = total(d), total(f)
    if FAMILY >= POWER and BASE_Z:
        # of et so far; a term is em - et / tilt, and em is asked for nowhere else
        sum_d = sum_f + sum_d * inverse_tilt
    return sum_d, sum_f, total(others), total(ties), total(own)


# ---------------------------------------------------------------- the mixture family: a sweep for its sums,
# and one for the gradient


@triton.jit
def log1p_psi(r):
    """(u, psi(u)) of u = log(1 + r), r >= -1/2, each to its own digits: 1 + r is a power of 2 times what
    `log_short` takes."""
    bits = (r + 1.0).to(tl.int32, bitcast=True)
    power = (bits - ROOT_HALF) >> 23
    f = tl.where(power == 0, r, (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0)
    short = log_short(f)
    u = tl.fma(power.to(tl.float32), LN2, f - short)
    return u, tl.where(power == 0, short, r - u)


@triton.jit
def mixed_terms(
    b, o, M, K, K_low, N, w, c, k, mix, base, other,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, SUMS: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """(q, xi, the terms summed) of a tile, the last only where they are asked for.

    The gradient is q (xi - the mean of xi under q). The terms are those of D; TVD's are of what o has more,
    of what b has more, and of b where o has more. y is cut off where e^y would be beyond reach: e and eo hold
    the rest, also of a class that only one has, and are 0 for one that neither has.
    """
    y = scaled_difference(b, o, k, K, K_low, CARRY, True)
    e, eo = b, o
    if SUMS or BASE_Z:
        e = tl.math.exp2(tl.fma(b, c, -M))
    if SUMS or not BASE_Z:
        eo = tl.math.exp2(tl.fma(o, c, -(M + N))) * w
    if FAMILY == TVD:
        xi = tl.where(y > 0.0, 0.5, tl.where(y < 0.0, -0.5, 0.0))
        gap = eo
        if SUMS:
            gap, _ = kl_terms(e, eo, y, psi_short, magnitude, select)
        more = tl.maximum(gap, 0.0)
        if BASE_Z:
            eo, xi = e, -xi
        return eo, xi, (more, more - gap, tl.where(gap > 0.0, e, 0.0))
    else:
        x = tl.minimum(tl.maximum(y, -REACH), REACH)
        s = psi_short(x)
        m1 = tl.where(tl.abs(x) < 0.5, x + s, tl.math.exp2(x * LOG2E) - 1.0)
        u, psi_u = log1p_psi(mix * m1)
        # where o has nearly all of m, log(o / m) is the difference of large numbers
        most = -tl.log(tl.full([], 0.0, tl.float32) + mix)
        ahead = tl.where(x > most + 17.0, most, x - u)
        xi = mixture_slope(m1, u, psi_u, ahead, mix, base, other, BASE_Z == STUDENT, FAMILY == SKEWED)
        term = u
        if SUMS:
            term = mixture_term(
                e, eo, x, m1, s, u, psi_u, ahead, mix, base, other, magnitude, select, FAMILY == SKEWED
            )
        if BASE_Z:
            eo = e
        return eo, xi, (term,)


@triton.jit
def mixed_tile(
    at, sums, BASE, OTHER, G, b0, o0, edge, vocab, label, M, K, K_low, N, w, factors, hard, c, k, mix, base,
    other,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, GRAD: tl.constexpr, CARRY: tl.constexpr,
    ACCESS: tl.constexpr,
    WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The lanes' sums with the tile at `at` added; or, for GRAD, its gradient written."""
    b, o, slope_b, slope_o = pair(
        BASE, OTHER, b0, o0, at, edge, vocab, ACCESS, "evict_first" if GRAD else "evict_last", WHOLE, RB, R
    )
    q, xi, terms = mixed_terms(
        b, o, M, K, K_low, N, w, c, k, mix, base, other, FAMILY, BASE_Z, not GRAD, CARRY
    )
    if not GRAD:
        f, lack, less, mass, moved = sums
        f += tl.sum(terms[0], 1)
        if FAMILY == TVD:
            lack += tl.sum(terms[1], 1)
            less += tl.sum(terms[2], 1)
        mass += tl.sum(q, 1)
        moved += tl.sum(q * xi, 1)
        sums = f, lack, less, mass, moved
    else:
        A, C = factors
        z, slope = (b, slope_b) if BASE_Z else (o, slope_o)
        g = with_hard(q * tl.fma(xi, A, C), z, slope, at, edge + label, hard, len(BASE) > 2, HARD, RB, R)
        store(G, at, edge, vocab, g, ACCESS, RB, R)
    return sums


@triton.jit
def mixed_sweep(
    BASE, OTHER, G, b0, o0, first, last, edge, vocab, label, top, K, K_low, factors, hard, c, k, mix, base,
    other,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, GRAD: tl.constexpr, CARRY: tl.constexpr,
    ACCESS: tl.constexpr,
    WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sums of the terms of D, of what b has more, of b where o has more, of q and of q xi; or, for GRAD, the
    gradient, q (A xi + C), with `factors` (A, C).

    The sums are taken backwards, as the end of the row is what the first sweep has just seen, and the
    gradient forwards again.
    """
    N, w = exponent_shift(K, K_low, c, k)
    M = tl.ceil(top * c)
    zero = tl.zeros([RB], tl.float32)
    sums = zero, zero, zero, zero, zero
    final = last_tile(first, last, RB * R)
    inner, end = interior(first, last, final, ACCESS, WHOLE, RB * R)
    from_end = last_tile(inner, end, RB * R)
    for forward in tl.range(inner, end, RB * R):
        sums = mixed_tile(
            forward if GRAD else from_end - (forward - inner), sums, BASE, OTHER, G, b0, o0, edge, vocab,
            label,
            M, K, K_low, N, w, factors, hard, c, k, mix, base, other,
            FAMILY, BASE_Z, HARD, GRAD, CARRY, EVEN if ACCESS == WINDOW and not WHOLE else ACCESS, WHOLE, RB,
            R,
        )  # fmt: skip
    if ACCESS != EVEN and not WHOLE:
        for at in tl.range(first, last, tl.maximum(final - first, RB * R)):
            sums = mixed_tile(
                at, sums, BASE, OTHER, G, b0, o0, edge, vocab, label, M, K, K_low, N, w, factors,
                hard, c, k, mix, base, other, FAMILY, BASE_Z, HARD, GRAD, CARRY, ACCESS, WHOLE, RB, R,
            )  # fmt: skip
    return total(sums[0]), total(sums[1]), total(sums[2]), total(sums[3]), total(sums[4])


@triton.jit
def mixed_value(s, sums, FAMILY: tl.constexpr):
    """D. TVD is what one of the two has more, or the other; of the two sums the one over less of o, by whose
    weight it is in error."""
    f, lack, less = sums[0], sums[1], sums[2]
    if FAMILY == TVD:
        f = tl.where(less + f > 0.5 * s, lack, f)
    return tl.maximum(f, 0.0) / s


@triton.jit
def mixed_coefficients(s, sums, scale):
    """(A, C): scale T dD/dz = q (A xi + C), q summing to `mass`, near s."""
    _, _, _, mass, moved = sums
    return (scale / s).to(tl.float32), (-scale / s * (moved / mass)).to(tl.float32)


@triton.jit
def write_zeros(G, first, last, BLOCK: tl.constexpr):
    for at in tl.range(first, last, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        tl.store(G + cols, tl.zeros([BLOCK], tl.float32).to(G.dtype.element_ty), mask=cols < last)


# ---------------------------------------------------------------- closing a row


@triton.jit
def settled(s, so, d, u, hard, top, K, c, tilt, FAMILY: tl.constexpr):
    """Whether the sums of the first sweep are numbers that the rest can be made of."""
    ok = finite(d) & finite(hard[0] + hard[1]) & (s > 0.0)
    if FAMILY != MOMENTS:
        ok = ok & finite(s) & finite(so) & (so > 0.0) & (tl.abs(top * c) < MOST) & (tl.abs(K) < MOST)
    if FAMILY >= POWER:
        # log R = log(u/s) - tilt log(so/s): exponents of 40 nats are within a float's range, and their
        # rounding (see `poor`) within bounds
        ok = ok & (u > 0.0) & (tl.abs(tl.log(u / s) - tilt * tl.log(so / s)) < 40.0)
    return ok


@triton.jit
def lost_row():
    """The loss of a row that `careful_rows` is to compute: a nan that arithmetic does not make."""
    return tl.full([], LOST, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def is_lost(loss):
    return loss.to(tl.int64, bitcast=True) == LOST


@triton.jit
def judged(
    s, so, d, p, u, hard, f, top, top_o, K, c, k, tilt,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """(settled, h, log R, poor) of the sums of a first sweep."""
    ok = settled(s, so, d, u, hard, top, K, c, tilt, FAMILY)
    h = missing(s, so, d, FAMILY, CENTERED)
    log_r = log_power_sum(s, p, u, h, tilt) if FAMILY >= POWER else h * 0.0
    if not reverses(FAMILY, BASE_Z):
        again = poor(s, so, d, top, top_o, K, h, log_r, c, k, FAMILY)
        if mixes(FAMILY):
            again |= (s - tl.math.exp2(tl.fma(top, c, -tl.ceil(top * c))) < 1e-5 * s) & (h != 0.0)
    elif GRAD:
        # the second sweep does not mend it
        again = first_value(s, d, p, f, h, log_r, tilt, FAMILY, BASE_Z, CENTERED)[1]
    else:
        again = ok != ok
    return ok, h, log_r, ok & again


@triton.jit
def missing(s, so, d, FAMILY: tl.constexpr, CENTERED: tl.constexpr):
    """h: what the reference lacks, in units of y."""
    if FAMILY == MOMENTS:
        return d / s if CENTERED else d * 0.0
    else:
        near = tl.abs(d) < 0.5 * s
        return tl.where(near, log1p64(tl.where(near, d / s, 0.0)), tl.log(so / s))


@triton.jit
def log_power_sum(s, p, u, h, tilt):
    """log R, from sums that hold their digits where R is not near 1; near 1 it comes from F."""
    near = tl.abs(p) < 0.5 * s
    return tl.where(near, log1p64(tl.where(near, p / s, 0.0)), tl.log(u / s)) - tilt * h


@triton.jit
def poor(s, so, d, top, top_o, K, h, log_r, c, k, FAMILY: tl.constexpr):
    """Whether the first sweep should be repeated with K + h for its reference.

    Where |h| is large, h is a logarithm of rounded exponentials, 1e-7 of each, and so are q and w. That shows
    where both distributions are a few classes; elsewhere the gradient is large, or errors average. Where log
    R is large, so are the exponents of w: with the references of the second sweep, a dominant class of w has
    the same error, bit for bit, in its sum and in the gradient.
    """
    if FAMILY == MOMENTS:
        return s < 0.0
    else:
        x = wide(K) / k * c - tl.ceil(top_o * c) + tl.ceil(top * c)
        again = (tl.abs(d) >= 0.5 * s) & (s < 4.0) & (so * tl.exp(x / LOG2E) < 4.0)
        return again | (tl.abs(log_r) > 3.0)


@triton.jit
def divergence(s, d, f, h, log_r, tilt, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr):
    """(D, whether its sum cancels) from sums whose y still has h to lose. f is (1 - tilt) F s for other
    orders than 1."""
    if FAMILY == MOMENTS:
        F = tl.maximum(f / s - 0.5 * h * h, 0.0) if CENTERED else f / s
        F = tl.where(f < INF, F, INF)  # masks that differ
        value = tl.where((tilt == 0.0) & finite(F), 0.0, F * tl.where(tilt == 0.0, 1.0, tilt))
        return value, f > 16.0 * s * F
    else:
        b = wide(tilt)
        x = expm164(-h)
        if FAMILY >= POWER:
            xt = expm164(-b * h)
            own = (1.0 + xt) * f / (1.0 - b)
            still = s * (psi64(-h) - psi64(-b * h) / b) / (1.0 - b)
            cross = d * (x - xt) / (1.0 - b)
        else:
            own = f
            still = s * psi64(-h)
            cross = d * x
        F = tl.where(finite(f), tl.maximum(own + still + cross, 0.0) / s, INF)
        cancels = own + still + tl.abs(cross) > 16.0 * s * F
        if FAMILY == ALPHA:
            near = tl.abs(log_r) < 0.4
            return tl.where(near, F, expm164(tl.where(near, 0.0, log_r)) / (b * (b - 1.0))), cancels & near
        elif FAMILY == POWER:
            near = tl.abs(log_r) < 0.4
            log_r = tl.where(near, log1p64(tl.where(near, -b * (1.0 - b) * F, 0.0)), log_r)
            return log_r / (b - 1.0 if BASE_Z else -b), cancels & near
        else:
            return F, cancels


@triton.jit
def first_value(
    s, d, p, f, h, log_r, tilt, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr
):
    """`divergence` of a first sweep's sums; reverse KL is also h - sum e y / s, which holds its digits where
    it is large."""
    value, again = divergence(s, d, f, h, log_r, tilt, FAMILY, BASE_Z, CENTERED)
    if reverses(FAMILY, BASE_Z):
        whole = h - p / s
        direct = finite(whole) & (whole > 0.5)
        return tl.where(direct, whole, value), again & (direct == 0)
    else:
        return value, again


@triton.jit
def last_value(s, d, f, log_r, tilt, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr):
    """`divergence` of a second sweep's sums, of which d is next to nothing, or far from 1 what R is.

    Where a tiny order meets classes that only the student has, terms are so large that d, a difference of
    theirs, is their rounding.
    """
    if FAMILY >= POWER and BASE_Z:
        d = tl.where(tl.abs(d) < 0.5 * s, d, 0.0)
    return divergence(s, d, f, missing(s, s + d, d, FAMILY, CENTERED), log_r, tilt, FAMILY, BASE_Z, CENTERED)[
        0
    ]


@triton.jit
def coefficients(s, left, mean, log_r, direct, scale, tilt, FAMILY: tl.constexpr, OF_BASE: tl.constexpr):
    """(A, P, C): scale T dD in the base's logits is P et + C e, in the other's A em + P et + C e, where y is
    d + left; with eu for et where `direct`. mean: of y under q, for reverse KL; not
    finite where D is infinite.
    """
    unit = scale / s
    if FAMILY == MOMENTS:
        A, C = (unit * tilt).to(tl.float32), (-unit * tilt * left).to(tl.float32)
        return (0.0, A, C) if OF_BASE else (A, 0.0, C)
    elif OF_BASE and FAMILY == KL:
        unit = tl.where(finite(mean), unit, float("nan"))
        return 0.0, (-unit).to(tl.float32), (unit * mean).to(tl.float32)
    else:
        x = expm164(-left)
        if FAMILY == ALPHA:
            unit *= tl.exp(log_r) / (tilt if OF_BASE else 1.0 - wide(tilt))
        if FAMILY >= POWER:
            P = (-unit * tl.exp(-tilt * left - log_r)).to(tl.float32)
            less = tl.where(direct, -1.0, expm164(-tilt * left - log_r))
            if OF_BASE:
                return 0.0, P, (-unit * less).to(tl.float32)
            else:
                return (unit * (1.0 + x)).to(tl.float32), P, (unit * (x - less)).to(tl.float32)
        else:
            return (unit * (1.0 + x)).to(tl.float32), 0.0, (unit * x).to(tl.float32)


@triton.jit
def far(log_r):
    """Whether R is so far from 1 that q - w is subtracted as it stands, and D is a logarithm."""
    return tl.abs(log_r) > 1.0


@triton.jit
def repeated(K, K_low, h, again, c, k, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CARRY: tl.constexpr):
    """(K, K_low) of the next first sweep. What K + h rounds off matters where one class has nearly
    everything."""
    high, low, _ = shifted(K, K_low, h, False, c, k, FAMILY, BASE_Z, CARRY)
    return tl.where(again, high, K), tl.where(again, low, K_low) if splits(FAMILY, BASE_Z) else K_low


@triton.jit
def shifted(K, K_low, h, stay, c, k, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CARRY: tl.constexpr):
    """(K, K_low, left): K + K_low + h as the second sweep takes it, and what that leaves of it; K where it is
    to `stay`.

    h is c's, which k is a rounding away from.
    """
    exact = wide(K) + K_low + (h if FAMILY == MOMENTS else h * (wide(k) * LOG2E / c))
    high = tl.where(stay, K, exact.to(tl.float32))
    low = (exact - high).to(tl.float32)
    if not (CARRY or splits(FAMILY, BASE_Z)):
        low = low * 0.0
    low = tl.where(stay, 0.0, low)
    return high, low, exact - high - low


@triton.jit
def entropy(others, ties, own, top, c):
    """sum p (log sum e - log e), the sum without its largest term, which would swamp the others. The sums are
    over 2^M of top."""
    unit = tl.exp((wide(top) * c - tl.ceil(top * c)) / LOG2E)
    rest = others / unit + (ties - 1.0)
    return own / unit / LOG2E / (1.0 + rest) + log1p64(rest)


@triton.jit
def hard_term(hard, label_logit, hard_M):
    """(cross entropy, 2^{z_label log2(e) - hard_M}), `hard` the others."""
    x = (wide(label_logit) * LOG2E_SINGLE - hard_M) / LOG2E
    own = tl.exp(x)
    there = own > 1e-200
    value = tl.where(there, log1p64(hard / tl.where(there, own, 1.0)), tl.log(hard) - x)
    return tl.where(own == own, value, own), own


@triton.jit
def joined(
    value, own, others, depths, classes, reference, label_logit, scale, smoothing, z_loss, HARD: tl.constexpr
):
    """(1 - smoothing) CE + smoothing (lse - mean z) + z_loss lse^2 from CE, e^{z - reference} of the label
    and of all others together, and the sum of z - reference over so many classes; and its gradient, times
    `scale`: (factor of e^{z - reference}, that at the label, less so much at each class). What the label
    lacks to 1 comes from the others alone.
    """
    log_sum = tl.log(own + others)
    each = value * 0.0
    if HARD == SMOOTHED:
        value = (1.0 - smoothing) * value + smoothing * (log_sum - depths / classes)
        each = scale * smoothing / classes
    log_sum += reference
    gain, unit = 2.0 * z_loss * log_sum, scale / (own + others)
    at_label = unit * (own * (smoothing + gain) - others * (1.0 - smoothing)) - tl.where(
        label_logit == -INF, 0.0, each
    )
    return value + z_loss * log_sum * log_sum, unit * (1.0 + gain), at_label, each


@triton.jit
def weighted(value, hard_value, weight, value_scale, value_unit, hard_scale, HARD: tl.constexpr):
    """The loss of a row. value_scale comes as two factors, whose product need not be a float."""
    scale = wide(value_scale) * value_unit
    loss = tl.where(scale == 0.0, 0.0, scale * value)
    if HARD:
        loss += tl.where(hard_scale == 0.0, 0.0, hard_scale * hard_value)
    return weight * loss


@triton.jit
def tell_sides(STATS, told, s, so, top, K, K_low, c, k, FAMILY: tl.constexpr, BASE_Z: tl.constexpr):
    """Writes the log-sum-exps, entropies and top-1 classes of a row (stats.py), so and K those of the same
    first sweep."""
    moved, moved_o, _, _, place, place_o = told
    log_sum, log_sum_o = tl.log(moved), tl.log(moved_o)
    entropy, entropy_o = log_sum, log_sum_o
    if FAMILY != MOMENTS:
        M = wide(tl.ceil(top * c))
        log_sum, log_sum_o = tl.log(s) + M / LOG2E, tl.log(so) + (M + (wide(K) + K_low) / k * c) / LOG2E
        entropy, entropy_o = (
            tl.maximum(log_sum - moved / s / LOG2E, 0.0),
            tl.maximum(log_sum_o - moved_o / so / LOG2E, 0.0),
        )
    base = 0 if BASE_Z else 1
    tl.store(STATS + 2 + base, log_sum)
    tl.store(STATS + 3 - base, log_sum_o)
    tl.store(STATS + 4 + base, entropy)
    tl.store(STATS + 5 - base, entropy_o)
    tl.store(STATS + 6 + base, place)
    tl.store(STATS + 7 - base, place_o)


@triton.jit
def tell_terms(STATS, value, cross_entropy, factor, HARD: tl.constexpr):
    """Writes D and the cross entropy of a row."""
    tl.store(STATS, value * factor)
    if HARD:
        tl.store(STATS + 1, cross_entropy)


# ---------------------------------------------------------------- where rows are


@triton.jit
def row_at(row, inner, outer_stride, inner_stride, R: tl.constexpr, ACCESS: tl.constexpr):
    """(offset of the row's window, place of class 0 in it): the window begins on 16 bytes unless ACCESS is
    SCALAR."""
    start = row // inner * outer_stride + row % inner * inner_stride
    if ACCESS == SCALAR:
        return start, 0
    else:
        aligned = start // R * R
        return aligned, (start - aligned).to(tl.int32) if ACCESS == WINDOW else 0


@triton.jit
def label_of(LABELS, Z, row, edge, vocab):
    """(label, its logit as it was given): nan for a label outside the vocabulary."""
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < vocab)
    logit = tl.load(Z[0] + edge + label, mask=known, other=float("nan")).to(tl.float32)
    return tl.where(known, label, -1).to(tl.int32), logit


# ---------------------------------------------------------------- the kernels: a row to a program


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROWS_DATA)
def loss_rows(
    Z, V, G, LABELS, WEIGHTS, LOSS, STATS,
    rows, inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner, vocab, width,
    c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit, grad_scale,
    hard_scale, hard_grad_scale, smoothing, z_loss, z_scale, z_softcap, z_steepness, v_scale, v_softcap,
    v_steepness, factor,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr, HARD: tl.constexpr,
    WEIGHTED: tl.constexpr, GRAD: tl.constexpr,
    TRANSFORM: tl.constexpr, TELL: tl.constexpr, CARRY: tl.constexpr,
    ACCESS: tl.constexpr, WHOLE: tl.constexpr,
    RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The operator's contract (ops.py); a row that `careful_rows` has to compute is left as it is, and its
    loss says so."""
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = long(index)
        weight = tl.load(WEIGHTS + row) if WEIGHTED else wide(1.0)
        z_at, edge = row_at(row, inner, z_outer, z_inner, R, ACCESS)
        v_at, _ = row_at(row, inner, v_outer, v_inner, R, ACCESS)
        g_at, _ = row_at(row, inner, g_outer, g_inner, R, ACCESS)
        if GRAD:
            write_zeros(G + g_at + edge, tl.where(weight == 0.0, 0, vocab), width, RB * R)
        if weight == 0.0:
            tl.store(LOSS + row, weight)
        else:
            one_row(
                side(Z + z_at, z_scale, z_softcap, z_steepness, TRANSFORM), side(V + v_at, v_scale,
                v_softcap, v_steepness, TRANSFORM),
                G + g_at, LABELS, LOSS, STATS + row * COLUMNS, row, weight,
                edge, vocab,
                c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit,
                grad_scale, hard_scale, hard_grad_scale, smoothing,
                z_loss, factor,
                FAMILY, BASE_Z, CENTERED, HARD, GRAD, TELL, CARRY, ACCESS, WHOLE, RB, R,
            )  # fmt: skip


@triton.jit
def one_row(
    Z, V, G, LABELS, LOSS, STATS, row, weight, edge, vocab,
    c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit, grad_scale, hard_scale,
    hard_grad_scale, smoothing, z_loss,
    factor, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr, HARD: tl.constexpr,
    GRAD: tl.constexpr,
    TELL: tl.constexpr, CARRY: tl.constexpr, ACCESS: tl.constexpr, WHOLE: tl.constexpr, RB: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    if BASE_Z:
        BASE, OTHER = Z, V
    else:
        BASE, OTHER = V, Z
    b0, o0 = 0.0, 0.0
    if WHOLE:
        b0, o0 = (
            load(BASE[0], 0, edge, vocab, ACCESS, "", RB, R),
            load(OTHER[0], 0, edge, vocab, ACCESS, "", RB, R),
        )
    label, label_logit = -1, LOW
    if HARD:
        label, label_logit = label_of(LABELS, Z, row, edge, vocab)
        label_logit = transformed(label_logit, Z, psi_short)[0]
    top, K, top_o = sample(BASE, OTHER, b0, o0, edge, vocab, c, k, FAMILY, CENTERED, WHOLE)
    hard_M = tl.ceil(tl.maximum(label_logit, top if BASE_Z else top_o) * LOG2E_SINGLE)
    s = wide(0.0)
    so, d, p, u, hard, f, h, log_r = s, s, s, s, (s, s, s), s, s, s
    told = s, s, s, s, s, s
    K_low = K * 0.0
    ok, going = label == -2, label != -2
    # unrolled, the compiler keeps what all threads have in common in one place, which saves 1.6 instructions
    # a logit; whole rows, which are short of registers, are better off with a loop a value of reverse KL
    # alone has no second turn: unrolled, it would be in a branch never taken, which Triton 3.6 does not
    # compile
    for turn in tl.range(
        1 if reverses(FAMILY, BASE_Z) and not (GRAD or WHOLE) else 2, loop_unroll_factor=1 if WHOLE else 2
    ):
        if going:
            top, top_o, s, so, d, p, u, hard, f, told = first_sweep(
                BASE, OTHER, b0, o0, 0, edge + vocab, edge, vocab, label, top, top_o, K, K_low, hard_M, c, k,
                tilt, inverse_tilt,
                FAMILY, BASE_Z, HARD, first_has_terms(FAMILY, BASE_Z, GRAD), TELL, CARRY, ACCESS, WHOLE, RB,
                R,
            )  # fmt: skip
            ok, h, log_r, going = judged(
                s, so, d, p, u, hard, f, top, top_o, K, c, k, tilt, FAMILY, BASE_Z, CENTERED, GRAD
            )
            K, K_low = repeated(K, K_low, h, going & (turn == 0), c, k, FAMILY, BASE_Z, CARRY)
    loss = lost_row()
    if ok:
        scale = weight * grad_scale
        if TELL:
            tell_sides(STATS, told, s, so, top, K, K_low, c, k, FAMILY, BASE_Z)
        hard_value, cross_entropy, hard_gradient = hard_of(
            hard, label_logit, hard_M, weight * hard_grad_scale, smoothing, z_loss, HARD
        )
        value, again = first_value(s, d, p, f, h, log_r, tilt, FAMILY, BASE_Z, CENTERED)
        if mixes(FAMILY):
            K, K_low, _ = shifted(K, K_low, h, False, c, k, FAMILY, BASE_Z, CARRY)
            value = mixed_row(
                BASE, OTHER, G, b0, o0, edge, vocab, label, s, top, K, K_low, scale, hard_gradient,
                c, k, tilt, base_share, other_share, FAMILY, BASE_Z, HARD, GRAD, CARRY, ACCESS, WHOLE, RB, R,
            )  # fmt: skip
        elif again | GRAD | (FAMILY == ENTROPY):
            K, K_low, factors, direct = plan_second(
                s, p, h, log_r, value, K, K_low, scale, c, k, tilt, FAMILY, BASE_Z, GRAD, CARRY
            )
            d, f, others, ties, own = second_sweep(
                BASE, OTHER, G, b0, o0, 0, edge + vocab, edge, vocab, label, top, K, K_low, factors, direct,
                hard_gradient,
                c, k, tilt, inverse_tilt, FAMILY, BASE_Z, HARD, GRAD, CARRY, ACCESS, WHOLE, RB, R,
            )  # fmt: skip
            if not (reverses(FAMILY, BASE_Z) and GRAD):
                value = last_value(s, d, f, log_r, tilt, FAMILY, BASE_Z, CENTERED)
            if FAMILY == ENTROPY:
                value += entropy(others, ties, own, top, c)
        loss = weighted(value, hard_value, weight, value_scale, value_unit, hard_scale, HARD)
        if TELL:
            tell_terms(STATS, value, cross_entropy, factor, HARD)
    tl.store(LOSS + row, loss)


@triton.jit
def mixed_row(
    BASE, OTHER, G, b0, o0, edge, vocab, label, s, top, K, K_low, scale, hard, c, k, mix, base, other,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, GRAD: tl.constexpr, CARRY: tl.constexpr,
    ACCESS: tl.constexpr,
    WHOLE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """D of a row of the mixture family, whose first sweep has found K; writes its gradient."""
    sums = mixed_sweep(
        BASE, OTHER, G, b0, o0, 0, edge + vocab, edge, vocab, label, top, K, K_low, scale, hard,
        c, k, mix, base, other, FAMILY, BASE_Z, False, False, CARRY, ACCESS, WHOLE, RB, R,
    )  # fmt: skip
    value = mixed_value(s, sums, FAMILY)
    if GRAD:
        mixed_sweep(
            BASE, OTHER, G, b0, o0, 0, edge + vocab, edge, vocab, label, top, K, K_low, mixed_coefficients(s,
            sums, scale), hard,
            c, k, mix, base, other, FAMILY, BASE_Z, HARD, True, CARRY, ACCESS, WHOLE, RB, R,
        )  # fmt: skip
    return value


@triton.jit
def plan_second(
    s,
    p,
    h,
    log_r,
    value,
    K,
    K_low,
    scale,
    c,
    k,
    tilt,
    FAMILY: tl.constexpr,
    BASE_Z: tl.constexpr,
    GRAD: tl.constexpr,
    CARRY: tl.constexpr,
):
    """(K, K_low, factors, direct): what a second sweep refers to, and there the coefficients of each
    gradient."""
    direct = far(log_r)
    mean = p / s
    if reverses(FAMILY, BASE_Z) and GRAD:
        # y as it was summed: near its mean, K, where its rounding is least, and the same in the gradient as
        # in the mean
        mean = tl.where(finite(value), mean, float("nan"))
        return K, K_low, coefficients(s, h, mean, log_r, direct, scale, tilt, FAMILY, True), direct
    else:
        high, low, left = shifted(K, K_low, h, direct, c, k, FAMILY, BASE_Z, CARRY)
        mean += (wide(K) - high) + (wide(K_low) - low)
        return high, low, coefficients(s, left, mean, log_r, direct, scale, tilt, FAMILY, BASE_Z), direct


@triton.jit
def hard_of(hard, label_logit, hard_M, scale, smoothing, z_loss, HARD: tl.constexpr):
    """(the hard term, the cross entropy alone, the gradient of the first for `with_hard`).

    That is M, the factor of 2^{z log2(e) - M}, what the label has, and what smoothing takes from each class.
    """
    if HARD:
        others, exponents, classes = hard
        cross_entropy, own = hard_term(others, label_logit, hard_M)
        value, factor, at_label, each = joined(
            cross_entropy, own, others, exponents / LOG2E, classes, wide(hard_M) / LOG2E_SINGLE, label_logit,
            scale, smoothing, z_loss, HARD
        )  # fmt: skip
        return (
            value,
            cross_entropy,
            (hard_M, factor.to(tl.float32), at_label.to(tl.float32), each.to(tl.float32)),
        )
    else:
        return hard[0], hard[0], (0.0, 0.0, 0.0, 0.0)


# ---------------------------------------------------------------- several programs to a row


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROWS_DATA)
def loss_parts(
    Z, V, G, LABELS, WEIGHTS, LOSS, STATS, STATE, COUNTERS,
    rows, inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner, vocab, width,
    c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit, grad_scale,
    hard_scale, hard_grad_scale, smoothing, z_loss, z_scale, z_softcap, z_steepness, v_scale, v_softcap,
    v_steepness, factor,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr, HARD: tl.constexpr,
    WEIGHTED: tl.constexpr, GRAD: tl.constexpr,
    TRANSFORM: tl.constexpr, TELL: tl.constexpr, CARRY: tl.constexpr,
    ACCESS: tl.constexpr, PARTS: tl.constexpr,
    PHASE: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`loss_rows` with PARTS programs to a row, which exchange their sums through STATE, [rows, PARTS,
    SLOTS].

    A part is a ticket, drawn in order, so that the parts a program waits for have all begun, or will on a
    program that waits for nobody. COUNTERS, zeros: tickets, then for each row how many parts have published
    their sums and how many have finished. The interpreter, which runs programs one after another, launches
    the phases one after another: the sums, those of the rows that are `poor` again, and the rest.
    """
    if PHASE == BOTH:
        ticket = tl.atomic_add(COUNTERS, 1)
    else:
        ticket = tl.program_id(0)
    while ticket < rows * PARTS:
        row = long(ticket // PARTS)
        part = ticket % PARTS
        weight = tl.load(WEIGHTS + row) if WEIGHTED else wide(1.0)
        z_at, edge = row_at(row, inner, z_outer, z_inner, R, ACCESS)
        v_at, _ = row_at(row, inner, v_outer, v_inner, R, ACCESS)
        g_at, _ = row_at(row, inner, g_outer, g_inner, R, ACCESS)
        if PHASE >= FINISH:
            if part == 0:
                if GRAD:
                    write_zeros(G + g_at + edge, tl.where(weight == 0.0, 0, vocab), width, RB * R)
        if weight == 0.0:
            tl.store(LOSS + row, weight)
        else:
            one_part(
                side(Z + z_at, z_scale, z_softcap, z_steepness, TRANSFORM), side(V + v_at, v_scale,
                v_softcap, v_steepness, TRANSFORM),
                G + g_at, LABELS, LOSS, STATS + row * COLUMNS,
                STATE + row * (PARTS * SLOTS),
                COUNTERS + 1 + 2 * row, row, part, weight, edge, vocab,
                c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit,
                grad_scale, hard_scale, hard_grad_scale, smoothing,
                z_loss, factor,
                FAMILY, BASE_Z, CENTERED, HARD, GRAD, TELL, CARRY, ACCESS, PARTS, PHASE, RB, R,
            )  # fmt: skip
        if PHASE == BOTH:
            ticket = tl.atomic_add(COUNTERS, 1)
        else:
            ticket += rows * PARTS


@triton.jit
def one_part(
    Z, V, G, LABELS, LOSS, STATS, STATE, COUNTERS, row, part, weight, edge, vocab,
    c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit, grad_scale, hard_scale,
    hard_grad_scale, smoothing, z_loss,
    factor, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr, HARD: tl.constexpr,
    GRAD: tl.constexpr,
    TELL: tl.constexpr, CARRY: tl.constexpr, ACCESS: tl.constexpr, PARTS: tl.constexpr, PHASE: tl.constexpr,
    RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    if BASE_Z:
        BASE, OTHER = Z, V
    else:
        BASE, OTHER = V, Z
    size = tl.cdiv(edge + vocab, PARTS * RB * R) * (RB * R)
    first = part * size
    last = tl.minimum(first + size, edge + vocab)
    label, label_logit = -1, LOW
    if HARD:
        label, label_logit = label_of(LABELS, Z, row, edge, vocab)
        label_logit = transformed(label_logit, Z, psi_short)[0]
    # all parts sample the same classes, so that they have the same reference
    top, K, top_o = sample(BASE, OTHER, 0.0, 0.0, edge, vocab, c, k, FAMILY, CENTERED, False)
    hard_M = tl.ceil(tl.maximum(label_logit, top if BASE_Z else top_o) * LOG2E_SINGLE)
    s = wide(0.0)
    so, d, p, u, hard, f, h, log_r = s, s, s, s, (s, s, s), s, s, s
    told = s, s, s, s, s, s
    K_low = K * 0.0
    ok, going = label == -2, label != -2
    for turn in tl.static_range(2):
        SUMS = STATE + turn * SUM_SLOTS
        if going:
            if (PHASE == BOTH) | (turn == PHASE):
                publish(
                    BASE, OTHER, SUMS + part * SLOTS, first, last, edge, vocab, label, label_logit, top,
                    top_o, K, K_low, hard_M,
                    c, k, tilt, inverse_tilt, FAMILY, BASE_Z, HARD, first_has_terms(FAMILY, BASE_Z, GRAD),
                    TELL, CARRY, ACCESS, RB, R,
                )  # fmt: skip
            if PHASE == BOTH:
                tl.debug_barrier()
                arrived = tl.atomic_add(COUNTERS, 1, sem="acq_rel") + 1
                while arrived < (turn + 1) * PARTS:
                    arrived = tl.atomic_add(COUNTERS, 0, sem="acquire")
            if (PHASE >= MIX) | (turn < PHASE):
                top, top_o, K, K_low, s, so, d, p, u, hard, f, told = merged_sums(
                    SUMS, part, c, k, FAMILY, HARD, TELL, PARTS
                )
                # in later phases the gradient may have taken the logits' place
                hard_M = tl.load(SUMS + part * SLOTS + 10).to(tl.float32)
                label_logit = tl.load(SUMS + part * SLOTS + 11).to(tl.float32)
                ok, h, log_r, going = judged(
                    s, so, d, p, u, hard, f, top, top_o, K, c, k, tilt, FAMILY, BASE_Z, CENTERED, GRAD
                )
                if turn == 0:
                    K, K_low = repeated(K, K_low, h, going, c, k, FAMILY, BASE_Z, CARRY)
    if PHASE >= MIX:
        if ok:
            if TELL:
                if part == 0:
                    tell_sides(STATS, told, s, so, top, K, K_low, c, k, FAMILY, BASE_Z)
            finish(
                BASE, OTHER, G, LOSS, STATS, STATE + 2 * SUM_SLOTS, COUNTERS + 1, row, part, first, last,
                weight, edge, vocab,
                label, label_logit, top, K, K_low, s, d, p, f, hard, h, log_r, hard_M,
                c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit, grad_scale,
                hard_scale, hard_grad_scale,
                smoothing, z_loss, factor, FAMILY, BASE_Z, CENTERED, HARD, GRAD, TELL, CARRY, ACCESS, PARTS,
                PHASE, RB, R,
            )  # fmt: skip
        else:
            tl.store(LOSS + row, lost_row())


@triton.jit
def publish(
    BASE, OTHER, SLOT, first, last, edge, vocab, label, label_logit, top, top_o, K, K_low, hard_M, c, k,
    tilt, inverse_tilt,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, HARD: tl.constexpr, VALUE: tl.constexpr, TELL: tl.constexpr,
    CARRY: tl.constexpr, ACCESS: tl.constexpr, RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The first sweep of a part."""
    top, top_o, s, so, d, p, u, hard, f, told = first_sweep(
        BASE, OTHER, 0.0, 0.0, first, last, edge, vocab, label, top, top_o, K, K_low, hard_M, c, k, tilt,
        inverse_tilt,
        FAMILY, BASE_Z, HARD, VALUE, TELL, CARRY, ACCESS, False, RB, R,
    )  # fmt: skip
    tl.store(SLOT, wide(top))
    tl.store(SLOT + 1, wide(top_o))
    tl.store(SLOT + 2, wide(K))
    tl.store(SLOT + 3, s)
    tl.store(SLOT + 4, so)
    tl.store(SLOT + 5, d)
    tl.store(SLOT + 6, p)
    tl.store(SLOT + 7, u)
    tl.store(SLOT + 8, hard[0])
    tl.store(SLOT + 9, f)
    tl.store(SLOT + 10, wide(hard_M))
    tl.store(SLOT + 11, wide(label_logit))
    tl.store(SLOT + 12, wide(K_low))
    if HARD == SMOOTHED:
        tl.store(SLOT + 13, hard[1])
        tl.store(SLOT + 14, hard[2])
    if TELL:
        for i in tl.static_range(6):
            tl.store(SLOT + 15 + i, told[i])


@triton.jit
def merged(STATE, slot: tl.constexpr, unit, PARTS: tl.constexpr):
    """The sum over parts of one number, in a fixed order; past the first-level cache, which another program's
    stores do not reach."""
    return tl.sum(unit * tl.load(STATE + slot + tl.arange(0, PARTS) * SLOTS, cache_modifier=".cg"), 0)


@triton.jit
def merged_sums(
    SUMS, part, c, k, FAMILY: tl.constexpr, HARD: tl.constexpr, TELL: tl.constexpr, PARTS: tl.constexpr
):
    """What `first_sweep` returns, of all parts together, and (K, K_low)."""
    tops = tl.load(SUMS + tl.arange(0, PARTS) * SLOTS, cache_modifier=".cg")
    tops_o = tl.load(SUMS + 1 + tl.arange(0, PARTS) * SLOTS, cache_modifier=".cg")
    top, top_o = tl.max(tops, 0).to(tl.float32), tl.max(tops_o, 0).to(tl.float32)
    one = tl.full([PARTS], 1.0, tl.float64)
    unit = one
    if FAMILY != MOMENTS:
        unit = tl.math.exp2(tl.ceil(tops.to(tl.float32) * c) - tl.ceil(top * c)).to(tl.float64)
    p = merged(SUMS, 6, unit, PARTS)
    exponents, classes = wide(0.0), wide(0.0)
    if HARD == SMOOTHED:
        exponents, classes = merged(SUMS, 13, one, PARTS), merged(SUMS, 14, one, PARTS)
    moved = wide(0.0)
    moved_o, best, best_o, place, place_o = moved, moved, moved, moved, moved
    if TELL:
        moved, moved_o = merged(SUMS, 15, unit, PARTS), merged(SUMS, 16, unit, PARTS)
        best, place = merged_class(SUMS, 17, PARTS)
        best_o, place_o = merged_class(SUMS, 18, PARTS)
    return (
        top, top_o, tl.load(SUMS + part * SLOTS + 2).to(tl.float32),
        tl.load(SUMS + part * SLOTS + 12).to(tl.float32),
        merged(SUMS, 3, unit, PARTS), merged(SUMS, 4, unit, PARTS), merged(SUMS, 5, unit, PARTS), p,
        merged(SUMS, 7, unit, PARTS), (merged(SUMS, 8, one, PARTS), exponents, classes), merged(SUMS, 9,
        unit, PARTS),
        (moved, moved_o, best, best_o, place, place_o),
    )  # fmt: skip


@triton.jit
def merged_class(SUMS, slot: tl.constexpr, PARTS: tl.constexpr):
    """(the largest logit of all parts, the first class that has it)."""
    best = tl.load(SUMS + slot + tl.arange(0, PARTS) * SLOTS, cache_modifier=".cg")
    place = tl.load(SUMS + slot + 2 + tl.arange(0, PARTS) * SLOTS, cache_modifier=".cg")
    largest = tl.max(best, 0)
    return largest, tl.min(tl.where(best == largest, place, INF), 0)


@triton.jit
def finish(
    BASE, OTHER, G, LOSS, STATS, STATE, DONE, row, part, first, last, weight, edge, vocab,
    label, label_logit, top, K, K_low, s, d, p, f, hard, h, log_r, hard_M,
    c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit, grad_scale, hard_scale,
    hard_grad_scale, smoothing, z_loss,
    factor, FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr, HARD: tl.constexpr,
    GRAD: tl.constexpr,
    TELL: tl.constexpr, CARRY: tl.constexpr, ACCESS: tl.constexpr, PARTS: tl.constexpr, PHASE: tl.constexpr,
    RB: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The other sweeps of a part; whoever is last adds the parts up."""
    hard_value, cross_entropy, hard_gradient = hard_of(
        hard, label_logit, hard_M, weight * hard_grad_scale, smoothing, z_loss, HARD
    )
    scale = weight * grad_scale
    if mixes(FAMILY):
        K, K_low, _ = shifted(K, K_low, h, False, c, k, FAMILY, BASE_Z, CARRY)
        last_one = part == 0
        if PHASE != FINISH:
            sums = mixed_sweep(
                BASE, OTHER, G, 0.0, 0.0, first, last, edge, vocab, label, top, K, K_low, scale,
                hard_gradient,
                c, k, tilt, base_share, other_share, FAMILY, BASE_Z, False, False, CARRY, ACCESS, False, RB,
                R,
            )  # fmt: skip
            publish_second(STATE + part * SLOTS, sums)
        if PHASE == BOTH:
            tl.debug_barrier()
            arrived = tl.atomic_add(DONE, 1, sem="acq_rel") + 1
            if GRAD:
                while arrived < PARTS:
                    arrived = tl.atomic_add(DONE, 0, sem="acquire")
            else:
                last_one = arrived == PARTS
        if PHASE >= FINISH:
            sums = merged_second(STATE, PARTS)
            value = mixed_value(s, sums, FAMILY)
            if GRAD:
                factors = mixed_coefficients(s, sums, scale)
                mixed_sweep(
                    BASE, OTHER, G, 0.0, 0.0, first, last, edge, vocab, label, top, K, K_low, factors,
                    hard_gradient,
                    c, k, tilt, base_share, other_share, FAMILY, BASE_Z, HARD, True, CARRY, ACCESS, False,
                    RB, R,
                )  # fmt: skip
            if last_one:
                tl.store(
                    LOSS + row, weighted(value, hard_value, weight, value_scale, value_unit, hard_scale, HARD)
                )
                if TELL:
                    tell_terms(STATS, value, cross_entropy, factor, HARD)
    elif PHASE >= FINISH:
        value, again = first_value(s, d, p, f, h, log_r, tilt, FAMILY, BASE_Z, CENTERED)
        last_one = part == 0
        if again | GRAD | (FAMILY == ENTROPY):
            K, K_low, factors, direct = plan_second(
                s, p, h, log_r, value, K, K_low, scale, c, k, tilt, FAMILY, BASE_Z, GRAD, CARRY
            )
            d, f, others, ties, own = second_sweep(
                BASE, OTHER, G, 0.0, 0.0, first, last, edge, vocab, label, top, K, K_low, factors, direct,
                hard_gradient,
                c, k, tilt, inverse_tilt, FAMILY, BASE_Z, HARD, GRAD, CARRY, ACCESS, False, RB, R,
            )  # fmt: skip
            if not (reverses(FAMILY, BASE_Z) and GRAD):
                publish_second(STATE + part * SLOTS, (d, f, others, ties, own))
                tl.debug_barrier()
                last_one = tl.atomic_add(DONE, 1, sem="acq_rel") == PARTS - 1
                if last_one:
                    d, f, others, ties, own = merged_second(STATE, PARTS)
                    value = last_value(s, d, f, log_r, tilt, FAMILY, BASE_Z, CENTERED)
                    if FAMILY == ENTROPY:
                        value += entropy(others, ties, own, top, c)
        if last_one:
            tl.store(
                LOSS + row, weighted(value, hard_value, weight, value_scale, value_unit, hard_scale, HARD)
            )
            if TELL:
                tell_terms(STATS, value, cross_entropy, factor, HARD)


@triton.jit
def publish_second(SLOT, sums):
    for i in tl.static_range(len(sums)):
        tl.store(SLOT + i, sums[i])


@triton.jit
def merged_second(STATE, PARTS: tl.constexpr):
    """What the sweep after the first returns, of all parts together."""
    one = tl.full([PARTS], 1.0, tl.float64)
    return (
        merged(STATE, 0, one, PARTS), merged(STATE, 1, one, PARTS), merged(STATE, 2, one, PARTS),
        merged(STATE, 3, one, PARTS), merged(STATE, 4, one, PARTS),
    )  # fmt: skip


# ---------------------------------------------------------------- log-softmax, and a factor


@triton.jit
def times(x, k, k_low):
    """x (k + k_low), rounded once for what matters of it."""
    return tl.fma(x, k, tl.where(finite(x), x, 0.0) * k_low)


@triton.jit(do_not_specialize=["vocab"])
def log_softmax_rows(X, U, OUT, vocab, k, k_low, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """log softmax(k x) of contiguous rows, k + k_low for k, or its gradient k (u - softmax(k x) sum u)."""
    start = tl.program_id(0).to(tl.int64) * vocab
    top = tl.full([BLOCK], LOW, tl.float32)
    s, upstream = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, vocab, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(X + start + cols, mask=cols < vocab, other=-INF, eviction_policy="evict_last").to(
            tl.float32
        )
        new = tl.maximum(top, x)
        s = s * tl.exp(times(top - new, k, k_low)) + tl.exp(times(x - new, k, k_low))
        top = new
        if BACKWARD:
            upstream += tl.load(
                U + start + cols, mask=cols < vocab, other=0.0, eviction_policy="evict_last"
            ).to(tl.float32)
    largest = tl.max(top, 0)
    lanes = s.to(tl.float64) * tl.exp(times(top - largest, k, k_low))
    every = tl.where(largest > LOW, tl.sum(lanes, 0), float("nan"))
    log_sum = tl.log(every)
    if every < 1.5:  # one class has nearly all: what the others have, to its own digits
        others = tl.zeros([BLOCK], tl.float32)
        for at in tl.range(0, vocab, BLOCK):
            cols = at + tl.arange(0, BLOCK)
            x = tl.load(X + start + cols, mask=cols < vocab, other=-INF).to(tl.float32)
            others += tl.where(x == largest, 0.0, tl.exp(times(x - largest, k, k_low)))
        log_sum = log1p64(total(others))
    u = total(upstream)
    for at in tl.range(0, vocab, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(X + start + cols, mask=cols < vocab, other=-INF, eviction_policy="evict_first").to(
            tl.float32
        )
        a = times(x - largest, k, k_low)
        if BACKWARD:
            upstream = tl.load(
                U + start + cols, mask=cols < vocab, other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
            out = (upstream - tl.exp(a) * (u / every).to(tl.float32)) * k
        else:
            out = a - log_sum.to(tl.float32)
        tl.store(OUT + start + cols, out.to(OUT.dtype.element_ty), mask=cols < vocab)


@triton.jit(do_not_specialize=["count"])
def scale_all(X, FACTOR, count, BLOCK: tl.constexpr):
    """X *= FACTOR, a number on the device; nothing is read of X where that is 1, nearly always: few programs
    find it out."""
    factor = tl.load(FACTOR)
    if factor != 1.0:
        start = long(tl.program_id(0)) * BLOCK
        while start < count:
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(X + cols, mask=cols < count)
            tl.store(X + cols, (x.to(tl.float32) * factor).to(X.dtype.element_ty), mask=cols < count)
            start += long(tl.num_programs(0)) * BLOCK

// The mathematics of the divergences: the twin of kdkernels/divergence.py.
//
// A divergence is a member of one of two families, seen from one of the two distributions, its *base* b (the
// other is o), with x = log(o / b) and psi(x) = e^x - 1 - x. All their terms are >= 0, so that D keeps its
// digits however close the two are.
//
// The power family, of order a:  weights t = b e^{tilt x},  R = sum t,  f(x) = (psi(x) - psi(tilt x) / tilt)
// / (1 - tilt),  F = sum b f(x)
//     KL(p, q), CE(p, q)           base p (teacher), tilt 0: f = psi            D = F;  CE adds the entropy
//     of p Renyi(a), Alpha(a), a > 1/2  base p, tilt 1 - a:  t = p^a q^(1-a)         D = -log(R) / (1 - a),
//     or F those with        a <= 1/2   base q (student), tilt a:  the same t        the same
// The smaller of the two tilts loses the least in F. R = 1 - tilt (1 - tilt) F. T dD/dz = q - w with w = t /
// R (w = p for KL), for Alpha times R / a.
//
// The mixture family, c_b KL(b, m) + c_o KL(o, m) with m = (1 - l) b + l o, where the base is what m has more
// of: l <= 1/2.
//     D = sum b k(x),   T dD/dz = G - q M with a G of each class and M = sum G (`mixed`, below)
// Reverse KL is l = 0, base p. TVD, sum b |e^x - 1| / 2, has the same shape. x must be whole there before a
// term can be formed, so that their rows are swept twice.
//
// Orders 0 and inf have no sum of terms; careful.h takes them. At T = inf two moments of z - v are all there
// is (moments.h).
#pragma once
#include "api.h"
#include "number.h"
#if defined(KD_GPU)
#include "cuda/verbs.h"  // a class to a thread
#else
#include "dtype.h"
#endif

namespace kd {
namespace KD_LEVEL {

constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.4426950408889634074;

// ---------------------------------------------------------------- exponentials, in base 2: y is x / ln 2
// Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the low bits. Coefficients are minimax
// on |r| <= 1/2 for float (9e-8 and, relative to psi, 1.3e-7) with the value at 0 exact, so that high
// temperatures carry no bias; Taylor for double.
template <class F, class Real, int N> KD_HD F polynomial(F r, const Real (&c)[N]) {
  F p = splat<F>(c[N - 1]);
  for (int j = N - 2; j >= 0; j--) p = p * r + c[j];
  return p;
}

template <class Real> struct Exp2;
template <> struct Exp2<float> {
  static constexpr float kRound = 12582912.f, kFloor = -125.f;
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000, kAbs = 0x7fffffff, kRootHalf = 0x3f3504f3;
  template <class F> static KD_HD F exp(F r) {
    constexpr float c[] = {1.f, 0.693147f, 0.24022247f, 0.05550711f, 0.009671292f, 0.0013269538f};
    return polynomial(r, c);
  }
  template <class F> static KD_HD F psi(F r) {
    constexpr float c[] = {0.2402265f, 0.05550382f, 0.009618149f, 0.0013380869f, 0.00015422578f};
    return polynomial(r, c);
  }
  template <class F> static KD_HD F psi_log(F f) {  // f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)]
    // two chains: what follows waits for the one
    constexpr float even[] = {.5f, 0.25000563f, 0.1663188f, 0.13082902f, 0.07786799f},
                    odd[] = {-0.33333328f, -0.2000136f, -0.1420354f, -0.12722263f};
    const F z = f * f;
    return z * (polynomial(z, even) + f * polynomial(z, odd));
  }
};
template <> struct Exp2<double> {
  static constexpr double kRound = 6755399441055744., kFloor = -1021.;
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000, kAbs = 0x7fffffffffffffff,
                           kRootHalf = 0x3fe6a09e667f3bcd;
  template <class F> static KD_HD F exp(F r) {
    constexpr double c[] = {1.0,
                            0.693147180559945309,
                            0.240226506959100712,
                            0.05550410866482158,
                            0.00961812910762847716,
                            0.00133335581464284434,
                            0.0001540353039338161,
                            0.0000152527338040598403,
                            1.32154867901443095e-6,
                            1.01780860092396997e-7,
                            7.05491162080112333e-9,
                            4.4455382718708115e-10,
                            2.56784359934882051e-11,
                            1.36914888539041289e-12};
    return polynomial(r, c);
  }
  template <class F> static KD_HD F psi(F r) {
    constexpr double c[] = {0.240226506959100712,   0.05550410866482158,     0.00961812910762847716,
                            0.00133335581464284434, 0.0001540353039338161,   0.0000152527338040598403,
                            1.32154867901443095e-6, 1.01780860092396997e-7,  7.05491162080112333e-9,
                            4.4455382718708115e-10, 2.56784359934882051e-11, 1.36914888539041289e-12,
                            6.77872635482254563e-14};
    return polynomial(r, c);
  }
  template <class F> static KD_HD F psi_log(F f) {  // log(1 + f) = 2 atanh(s) with s = f / (2 + f)
    constexpr double c[] = {2. / 3,  2. / 5,  2. / 7,  2. / 9,  2. / 11, 2. / 13,
                            2. / 15, 2. / 17, 2. / 19, 2. / 21, 2. / 23};
    const F s = f / (f + 2.), z = s * s;
    return s * (f - z * polynomial(z, c));
  }
};

// 2^(a c) for a c up to 127, and exactly 0 where a < floor = kFloor / c. The product is not rounded before it
// is reduced (a fused multiply-add where there is one).
template <class F>
KD_HD F exp2_of_product(F a, typename Element<F>::Real c, typename Element<F>::Real floor) {
  using E = Exp2<typename Element<F>::Real>;
  const F m = a * c + E::kRound, r = a * c + (E::kRound - m);
  return select(a < floor, F{}, from_bits(bits(E::exp(r)) + (bits(m) << E::kMantissa)));
}

#if defined(KD_GPU)
// The hardware's, within 2^-22. Every term of a class has the same e for a factor, so that its error is one
// of that class's weight.
KD_DEVICE float exp2_of_product(float a, float c, float) { return gpu::exp2(a * c); }
#endif

// e^x - 1 and e^x - 1 - x, each to a few rounding errors *relative*
template <class F> struct ExpM1 { F m1, psi; };

template <class F> KD_HD ExpM1<F> expm1_psi(F y) {  // |y| <= 120 (float), 1000 (double)
  using E = Exp2<typename Element<F>::Real>;
  using Real = typename Element<F>::Real;
  const F m = y + E::kRound, r = y + (E::kRound - m);
  const F psi = r * r * E::psi(r), e = r * Real(kLn2) + psi;
  const F s = from_bits((bits(m) << E::kMantissa) + E::kOne), m1 = s * e + (s - Real(1));
  return {m1, select(m == E::kRound, psi, m1 - y * Real(kLn2))};
}

// log2(1 + r) for r >= -1/2, to a rounding error or two.
template <class F> KD_HD F log2_of_1p(F r) {
  using E = Exp2<typename Element<F>::Real>;
  using Real = typename Element<F>::Real;
  const F t = r + Real(1);
  const auto k = (bits(t) - E::kRootHalf) >> E::kMantissa;
  const F f = select(k == 0, r, from_bits(bits(t) - (k << E::kMantissa)) - Real(1));
  return (f - E::psi_log(f)) * Real(kLog2e) + as_real(k);
}

// u = log(1 + r) and psi(u) = r - u, each to a few rounding errors *relative*
template <class F> struct Log1p { F log, psi; };

// For r >= -1/2. 1 + r = 2^k (1 + f) with 1 + f near 1.
template <class F> KD_HD Log1p<F> log1p_psi(F r) {
  using E = Exp2<typename Element<F>::Real>;
  using Real = typename Element<F>::Real;
  const F t = r + Real(1);
  const auto k = (bits(t) - E::kRootHalf) >> E::kMantissa;
  const auto whole = k == 0;
  const F f = select(whole, r, from_bits(bits(t) - (k << E::kMantissa)) - Real(1));
  const F psi = E::psi_log(f), u = (f - psi) + as_real(k) * Real(kLn2);
  return {u, select(whole, psi, r - u)};
}

KD_ONCE double psi(double x) {  // e^x - 1 - x, for the scalars of a row
  if (x > -.5 && x < .5) {
    double s = 0;
    for (int j = 16; j >= 2; j--) s = (s + 1) * (x * (1. / j));  // x/2 (1 + x/3 (1 + ...))
    return s * x;
  }
  return expm1_of(x) - x;
}

// ---------------------------------------------------------------- the families
enum Family : int32_t {
  kKL,
  kCrossEntropy,
  kRenyi,
  kAlpha,
  kMixture,
  kTvd,
  kSupport,
  kExtreme,
  kLogitMatching
};
constexpr const char *kNames = "kl,cross_entropy,renyi,alpha,mixture,tvd,support,extreme,logit_matching";

// The mixture family, of classes in units of b: D = sum b term(x), G = q xi(x). xi is up to a constant of the
// row, which q sum G takes off.
template <class Real> struct Mixed {
  // coefficients: 1e-7 (xi 5e-7) or 1e-16 of it, whatever l
  static constexpr int kNear = sizeof(Real) == 4 ? 8 : 22;
  Real l, base, other, keep, moves;  // keep = 1 - l; moves: of (o - b) / m in xi
  // xi from psi(-u), where log m and the share would cancel
  Real away_log, away_psi, away_share;
  // term and xi of a class that only one of the two has, times that one
  Real b_alone, o_alone, b_moves, o_moves;
  // term = y^2 sum c_j y^j and xi = y sum c_j y^j for |y| up to this
  Real near;
  Real near_term[kNear], near_xi[kNear];
  bool student_base, tvd, away;
};
template <class F> struct MixedTerm { F term, xi; };

template <class F> KD_HD F quotient(F a, F b) { return a / b; }
#if defined(KD_GPU)
KD_DEVICE float quotient(float a, float b) { return a * gpu::reciprocal(b); }  // within 2^-22
#endif

// A class, for l > 0 or l = 0 (reverse KL, or a weight that rounds to 0): m is e^x - 1 and psi(x). Mix: a
// Mixed<Real>, or one that knows more when it is compiled.
template <class F, class Mix> KD_HD MixedTerm<F> mixed_term(F x, const ExpM1<F> &m, const Mix &mix) {
  using Real = typename Element<F>::Real;
  const F ratio = m.m1 + Real(1);
  const auto near = (x > Real(-.5)) & (x < Real(.5));
  if (mix.l == 0)
    return {mix.other * select(near, m.m1 * m.m1 - ratio * m.psi, ratio * x - m.m1),
            (mix.student_base ? -m.m1 : x) * mix.other};
  const F more = m.m1 * mix.l;
  const Log1p<F> u = log1p_psi(more);
  const F w = x - u.log;  // log(o / m); log(b / m) is -u
  const F of_other =
      select(near, m.m1 * m.m1 * mix.keep + ratio * (u.psi - m.psi), ratio * w - m.m1 * mix.keep);
  F xi = mix.student_base ? u.log * -mix.base : w * mix.other;
  if (mix.away)
    xi = u.log * -mix.away_log -
         quotient((more * u.log - u.psi) * mix.away_psi + m.m1 * mix.away_share, more + Real(1));
  else if (mix.moves != 0)
    xi += quotient(m.m1 * mix.moves, more + Real(1));
  return {u.psi * mix.base + of_other * mix.other, xi};
}
template <class F, class Real> KD_HD MixedTerm<F> mixed_near(F y, const Mixed<Real> &mix) {
  return {y * y * polynomial(y, mix.near_term), y * polynomial(y, mix.near_xi)};
}
// Either, for y = x in base 2 and the bits of its magnitude.
template <class F, class Int, class Real>
KD_HD MixedTerm<F> mixed_class(F y, Int far, const Mixed<Real> &mix) {
  return all_within(far, mix.near) ? mixed_near(y, mix) : mixed_term(y * Real(kLn2), expm1_psi(y), mix);
}

// The coefficients c_j of x^power sum a_j x^j as y^power sum c_j y^j, with sum a_j x^j = of(x) at n Chebyshev
// nodes of |x| <= most.
template <class Real, class Of> void interpolate(int n, int power, double most, Of of, Real *c) {
  // T_k in powers of x / most and at the nodes, both by T_{k+1} = 2 x T_k - T_{k-1} from T_{-1} = x
  double now[33] = {1}, before[33] = {0, 1}, sum[32] = {}, x[32], y[32], at[32], at_before[32];
  for (int i = 0; i < n; i++) {
    x[i] = std::cos((i + .5) * 3.14159265358979323846 / n);
    y[i] = of(x[i] * most);
    at[i] = 1;
    at_before[i] = x[i];
  }
  for (int k = 0; k < n; k++) {
    double a = 0;
    for (int i = 0; i < n; i++) {
      const double next = 2 * x[i] * at[i] - at_before[i];
      a += y[i] * at[i];
      at_before[i] = at[i];
      at[i] = next;
    }
    for (int j = 0; j <= k; j++) sum[j] += a * (k ? 2 : 1) / n * now[j];
    for (int j = k + 1; j >= 0; j--) {
      const double next = (j ? 2 * now[j - 1] : 0) - before[j];
      before[j] = now[j];
      now[j] = next;
    }
  }
  for (int j = 0; j < n; j++) c[j] = Real(sum[j] * std::pow(kLn2, j + power) / std::pow(most, j));
}

// l, base, other: as Mixed has them.
inline Mixed<double> make_mixed(bool tvd, bool student_base, double l, double base, double other) {
  Mixed<double> r{};
  r.tvd = tvd;
  r.student_base = student_base;
  if (tvd) {
    r.o_alone = 1;
    r.b_moves = student_base ? 0 : -1;
    return r;
  }  // xi: tvd_side
  const double keep = 1 - l, rest = std::log1p(-l);
  r.l = l;
  r.keep = keep;
  r.base = base;
  r.other = other;
  const double less = base * l, more = other * keep;
  // else JSD's weights, as they are rounded
  if (std::fabs(less - more) > 1e-15 * (less + more)) r.moves = (r.student_base ? keep : l) * (less - more);
  r.away = r.student_base && r.moves > 0;
  r.away_log = base * l;
  r.away_psi = base * keep;
  r.away_share = other * keep * keep;
  r.b_alone = base * (-l - rest) + other * keep;
  r.b_moves = other * keep - base * (l + rest);
  r.o_alone = r.o_moves = other > 0 ? INFINITY : 0;
  if (l > 0) {
    r.o_alone = base * l + other * (l - 1 - std::log(l));
    r.o_moves = base * l - other * (keep + std::log(l));
  }
  r.near = kLog2e;
  const auto at = [&](double x) { return mixed_term<double>(x, ExpM1<double>{std::expm1(x), psi(x)}, r); };
  interpolate(r.kNear, 2, 1, [&](double x) { return at(x).term / (x * x); }, r.near_term);
  interpolate(r.kNear, 1, 1, [&](double x) { return at(x).xi / x; }, r.near_xi);
  return r;
}

inline Mixed<double> narrowed(const Mixed<double> &m, double) { return m; }
inline Mixed<float> narrowed(const Mixed<double> &m, float) {
  const auto f = [](double x) { return float(x); };
  Mixed<float> r{f(m.l),
                 f(m.base),
                 f(m.other),
                 f(m.keep),
                 f(m.moves),
                 f(m.away_log),
                 f(m.away_psi),
                 f(m.away_share),
                 f(m.b_alone),
                 f(m.o_alone),
                 f(m.b_moves),
                 f(m.o_moves),
                 0,
                 {},
                 {},
                 m.student_base,
                 m.tvd,
                 m.away};
  // fewer coefficients through nodes of their own: an even number leaves 0 out. The divergence of the base
  // alone, whose term is nearly (e^x - 1)^2, needs a smaller interval for them
  const double most = m.other == 0 ? .6 : 1;
  r.near = f(most * kLog2e);
  interpolate(
      r.kNear, 2, most, [&](double x) { return polynomial(x * kLog2e, m.near_term) * (kLog2e * kLog2e); },
      r.near_term);
  interpolate(
      r.kNear, 1, most, [&](double x) { return polynomial(x * kLog2e, m.near_xi) * kLog2e; }, r.near_xi);
  return r;
}

// What a call asks for, with every number that does not depend on the data computed once, in fp64.
struct Plan {
  bool student_base = false, tilted = false;
  bool entropy = false;             // the cross entropy: KL, and the teacher's entropy
  bool mixed = false, tvd = false;  // the mixture family, and TVD in it
  bool alpha = false;               // D is F itself
  bool moments = false;             // T = inf: moments.h
  bool centered = true;             // logit matching compares z and v themselves, not their shapes
  // every row in fp64: T = inf, orders 0 and inf, temperatures beyond the range of the tile step
  bool careful = false;
  bool support = false, extreme = false, reverse = false;
  double order = 1, tilt = 0, factor = 1;
  Mixed<double> mixture{};
  // high temperature: D is a small multiple of the squares of rounding errors' size
  bool exact = false;
  // a row is swept again where the terms of its value are, without their signs, this much larger than it
  double patience = 64;
  // 1 / T, as c ln 2, so that rows are computed at one temperature throughout
  double k = 0;
  double c = 0, c_low = 0;  // log2(e) / T, rounded to the Real of the rows, and what that left
};

inline Plan make_plan(const kd_call &c, bool wide) {
  Plan p;
  const double temperature = c.temperature;
  p.moments = std::isinf(temperature);
  p.centered = c.family != kLogitMatching;
  p.entropy = c.family == kCrossEntropy;
  p.alpha = c.family == kAlpha;
  p.support = c.family == kSupport;
  p.extreme = c.family == kExtreme;
  p.reverse = c.reverse;
  p.order = c.order;
  p.factor = c.factor;
  p.c = kLog2e / temperature;
  p.exact = temperature >= 64;
  // so few classes do not average their roundings out, and are swept again in no time
  if (c.vocab <= 1024) p.patience = 4;
  if (!wide) {
    p.c_low = p.c - float(p.c);
    p.c = float(p.c);
  }
  p.k = (p.exact ? p.c + p.c_low : p.c) * kLn2;
  if (p.moments) {
    p.factor = c.limit;
    p.careful = true;
    return p;
  }
  p.careful = p.support || p.extreme || temperature > 1e9 || temperature < 1e-9;
  p.tvd = c.family == kTvd;
  p.mixed = p.tvd || c.family == kMixture;
  if (p.mixed) {
    // at 1/2 either would do (Form.sides takes the teacher): q is e itself then
    p.student_base = !p.tvd && c.mix >= .5;
    p.mixture = p.student_base ? make_mixed(false, true, 1 - c.mix, c.student_part, c.teacher_part)
                               : make_mixed(p.tvd, false, c.mix, c.teacher_part, c.student_part);
    return p;
  }
  p.student_base = p.order <= .5;
  p.tilted = p.order != 1;
  p.tilt = p.student_base ? p.order : 1 - p.order;
  if (!wide) p.tilt = float(p.tilt);
  return p;
}

// f of the family, for the scalars of a row; tilt = 0 is KL
KD_HD double f_of(double x, double tilt) {
  return tilt == 0 ? psi(x) : (psi(x) - psi(tilt * x) / tilt) / (1 - tilt);
}

// log R from the sum of one sign, F, while R is near 1, where the logarithm of R itself would have lost its
// digits.
KD_HD bool near_one(double R) { return R > .5 && R < 1.5; }
KD_HD double log_of_R(double F, double R, const Plan &p) {
  return near_one(R) ? log1p_of(-p.tilt * (1 - p.tilt) * F) : log_of(R);
}

}  // namespace KD_LEVEL
}  // namespace kd

// The mathematics of the divergences: the twin of kdkernels/divergence.py.
//
// Every divergence here is a member of the power family, seen from one of the two distributions, its *base* b (the other is o):
//     x = log(o / b),   weights  t = b e^{tilt x},   R = sum t,   f(x) = (psi(x) - psi(tilt x) / tilt) / (1 - tilt),   F = sum b f(x)
// with psi(x) = e^x - 1 - x. All terms of F are >= 0, so it keeps its digits however close the two are. R = 1 - tilt (1 - tilt) F.
//     KL(p, q), CE(p, q)   base p (teacher), tilt 0: f = psi                     D = F;  CE adds the entropy of p
//     Renyi(a), a > 1/2    base p, tilt 1 - a:  t = p^a q^(1-a)                  D = -log(R) / (1 - a)
//     Renyi(a), a <= 1/2   base q (student), tilt a:  the same t                 D = -log(R) / (1 - a)
// The smaller of the two tilts (at most 1/2) loses the least in F. T dD/dz = q - w with w = t / R (w = p for KL).
// Orders 0 and inf have no such sum; careful.h takes them. At T = inf b is uniform and f(x) = x^2 / 2 (row.h, "moments").
#pragma once
#include "number.h"
#if defined(KD_GPU)
#include "cuda/verbs.h"   // a class to a thread
#else
#include "dtype.h"
#endif

namespace kd {
namespace KD_LEVEL {

constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.4426950408889634074;

// ---------------------------------------------------------------- exponentials, in base 2: y is x / ln 2
// Adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves it in the low bits. Coefficients are minimax on |r| <= 1/2 for
// float (9e-8 and, relative to psi, 1.3e-7) with the value at 0 exact, so that high temperatures carry no bias; Taylor for double.
template <class F, class Real, int N> KD_HD F polynomial(F r, const Real (&c)[N]) {
  F p = splat<F>(c[N - 1]);
  for (int j = N - 2; j >= 0; j--) p = p * r + c[j];
  return p;
}

template <class Real> struct Exp2;
template <> struct Exp2<float> {
  static constexpr float kRound = 12582912.f, kFloor = -125.f;
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000, kAbs = 0x7fffffff;
  template <class F> static KD_HD F exp(F r) {
    constexpr float c[] = {1.f, 0.693147f, 0.24022247f, 0.05550711f, 0.009671292f, 0.0013269538f};
    return polynomial(r, c);
  }
  template <class F> static KD_HD F psi(F r) {
    constexpr float c[] = {0.2402265f, 0.05550382f, 0.009618149f, 0.0013380869f, 0.00015422578f};
    return polynomial(r, c);
  }
};
template <> struct Exp2<double> {
  static constexpr double kRound = 6755399441055744., kFloor = -1021.;
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000, kAbs = 0x7fffffffffffffff;
  template <class F> static KD_HD F exp(F r) {
    constexpr double c[] = {1.0, 0.693147180559945309, 0.240226506959100712, 0.05550410866482158, 0.00961812910762847716,
        0.00133335581464284434, 0.0001540353039338161, 0.0000152527338040598403, 1.32154867901443095e-6, 1.01780860092396997e-7,
        7.05491162080112333e-9, 4.4455382718708115e-10, 2.56784359934882051e-11, 1.36914888539041289e-12};
    return polynomial(r, c);
  }
  template <class F> static KD_HD F psi(F r) {
    constexpr double c[] = {0.240226506959100712, 0.05550410866482158, 0.00961812910762847716, 0.00133335581464284434,
        0.0001540353039338161, 0.0000152527338040598403, 1.32154867901443095e-6, 1.01780860092396997e-7, 7.05491162080112333e-9,
        4.4455382718708115e-10, 2.56784359934882051e-11, 1.36914888539041289e-12, 6.77872635482254563e-14};
    return polynomial(r, c);
  }
};

// 2^(a c) for a c up to 127, and exactly 0 where a < floor = kFloor / c. The product is not rounded before it is reduced (a fused
// multiply-add where there is one).
template <class F> KD_HD F exp2_of_product(F a, typename Element<F>::Real c, typename Element<F>::Real floor) {
  using E = Exp2<typename Element<F>::Real>;
  const F m = a * c + E::kRound, r = a * c + (E::kRound - m);
  return select(a < floor, F{}, from_bits(bits(E::exp(r)) + (bits(m) << E::kMantissa)));
}

#if defined(KD_GPU)
// The hardware's, within 2^-22. Every term of a class has the same e for a factor, so that its error is one of that class's weight.
KD_DEVICE float exp2_of_product(float a, float c, float) { return gpu::exp2(a * c); }
#endif

template <class F> struct ExpM1 { F m1, psi; };   // e^x - 1 and e^x - 1 - x, each to a few rounding errors *relative*

template <class F> KD_HD ExpM1<F> expm1_psi(F y) {   // |y| <= 120 (float), 1000 (double)
  using E = Exp2<typename Element<F>::Real>;
  using Real = typename Element<F>::Real;
  const F m = y + E::kRound, r = y + (E::kRound - m);
  const F psi = r * r * E::psi(r), e = r * Real(kLn2) + psi;
  const F s = from_bits((bits(m) << E::kMantissa) + E::kOne), m1 = s * e + (s - Real(1));
  return {m1, select(m == E::kRound, psi, m1 - y * Real(kLn2))};
}

// ---------------------------------------------------------------- the family
enum Divergence : int32_t { kKL = 0, kCrossEntropy = 1, kRenyi = 2, kLogitMatching = 3 };
constexpr const char *kNames = "kl,cross_entropy,renyi,logit_matching";

// What a call asks for, with every number that does not depend on the data computed once, in fp64.
struct Plan {
  bool student_base = false, tilted = false, entropy = false;
  bool moments = false;                 // T = inf: only the first two moments of z - v count
  bool centered = true;                 // logit matching compares z and v themselves, not their shapes
  bool careful = false;                 // orders 0 and inf, temperatures beyond the range of the tile step
  double order = 1, tilt = 0, factor = 1;
  bool exact = false;                   // high temperature: D is a small multiple of the squares of rounding errors' size
  double k = 0;                         // 1 / T, as c ln 2, so that rows are computed at one temperature throughout
  double c = 0, c_low = 0;              // log2(e) / T, rounded to the Real of the rows, and what that left
};

inline Plan make_plan(int32_t divergence, double order, double temperature, bool wide) {
  Plan p;
  p.moments = std::isinf(temperature);
  p.centered = divergence != kLogitMatching;
  p.entropy = divergence == kCrossEntropy;
  p.order = divergence == kRenyi ? order : 1;
  p.c = kLog2e / temperature;
  p.exact = temperature >= 64;
  if (!wide) { p.c_low = p.c - float(p.c); p.c = float(p.c); }
  p.k = (p.exact ? p.c + p.c_low : p.c) * kLn2;
  p.student_base = p.order <= .5;
  p.tilted = p.order != 1;
  p.tilt = p.student_base ? p.order : 1 - p.order;
  if (!wide) p.tilt = float(p.tilt);
  if (p.moments) p.factor = p.order;
  p.careful = !p.moments && (p.order == 0 || std::isinf(p.order) || temperature > 1e9 || temperature < 1e-9);
  if (p.moments) p.tilted = p.student_base = false;
  return p;
}

KD_ONCE double psi(double x) {            // e^x - 1 - x, for the scalars of a row
  if (x > -.5 && x < .5) {
    double s = 0;
    for (int j = 16; j >= 2; j--) s = (s + 1) * (x * (1. / j));   // x/2 (1 + x/3 (1 + ...))
    return s * x;
  }
  return expm1_of(x) - x;
}

// f of the family, for the scalars of a row; tilt = 0 is KL
KD_HD double f_of(double x, double tilt) { return tilt == 0 ? psi(x) : (psi(x) - psi(tilt * x) / tilt) / (1 - tilt); }

// log R from the sum of one sign, F, while R is near 1, where the logarithm of R itself would have lost its digits.
KD_HD bool near_one(double R) { return R > .5 && R < 1.5; }
KD_HD double log_of_R(double F, double R, const Plan &p) { return near_one(R) ? log1p_of(-p.tilt * (1 - p.tilt) * F) : log_of(R); }

}  // namespace KD_LEVEL
}  // namespace kd

// Exponentials and logarithms of a number or of a vector of them, with relative errors of a few roundings,
// and psi(x) = e^x - 1 - x, of which every divergence is made.
//
// All are in base 2 inside: y stands for x / ln 2. What an F can do (bits, select, a device's own
// exp2_of_product) is overloaded for the device's numbers, which a template finds only where they come first.
#pragma once
#include "number.h"
#if !defined(KD_NUMBERS)
#error "include cpu/vector.h or cuda/number.h before the mathematics"
#endif

namespace kd {
namespace KD_LEVEL {

constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.4426950408889634074;

// 2^y is 2^m 2^r with m the nearest integer of y: adding kRound, 1.5 * 2^(mantissa bits), rounds y to m and
// leaves m in the low bits. For float the coefficients are minimax on |r| <= 1/2 (errors of 9e-8 and,
// relative to psi, of 1.3e-7) with the value at 0 exact, so that high temperatures have no bias; for double,
// Taylor's.
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
    // even and odd powers apart: the two sums are computed side by side
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

}  // namespace KD_LEVEL
}  // namespace kd

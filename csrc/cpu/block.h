// A block of classes on the CPU: how large it is, and walks over its vectors.
#pragma once
#include <type_traits>
#include "dtype.h"
#include "../row/row.h"

namespace kd {
namespace KD_LEVEL {
namespace {  // cpu.cpp is alone in including it, and a compiler does more with what nobody else can call

static_assert(KD_BF16 == int(DtypeCode::kBF16) && KD_F16 == int(DtypeCode::kF16) &&
                  KD_F32 == int(DtypeCode::kF32) && KD_F64 == int(DtypeCode::kF64),
              "");

constexpr int64_t kBlockBytes = 16384;  // of Reals: a block of both rows fits the first-level cache
template <class Real> constexpr int64_t kBlock = kBlockBytes / sizeof(Real);
// One array of Reals of a block; a vector may be read past its end.
template <class Real> constexpr int64_t kSlot = kBlock<Real> + 64 / sizeof(Real);
// |y| in base 2 within which nothing over- or underflows: 2^43 2^-125.
template <class Real> constexpr Real kReach = sizeof(Real) == 4 ? 43 : 430;

KD_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KD_HD int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
KD_HD int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// The logits of a block. S is what the rows are stored as: Real, or a 16-bit float that is widened as it is
// loaded.
template <class S> struct Logits {
  const S *base, *other;
  int64_t n;
};
template <class Real, class S> Logits<Real> widened(const Logits<S> &x, Real *base, Real *other) {
  copy_row(x.base, x.n, base);
  copy_row(x.other, x.n, other);
  return {base, other, x.n};
}

template <class Real> KD_HD double sum_of(typename Vec<Real>::D x) {
  double s = 0;
  for (int i = 0; i < Vec<Real>::W; i++) s += x[i];
  return s;
}

template <class Real> KD_HD Real largest_lane(typename Vec<Real>::F x) {
  Real top = x[0];
  for (int i = 1; i < Vec<Real>::W; i++) top = larger(x[i], top);
  return top;
}

template <class Real, class S> Real element(const S *x, int64_t i) {
  Real r;
  copy_row(x + i, 1, &r);
  return r;
}

template <class Real, class S> Real largest(const S *x, int64_t n) {
  if constexpr (std::is_same<S, bf16>::value)
    return largest_half((const uint16_t *)x, n, half_value<bf16>, 0xff80);
  if constexpr (std::is_same<S, f16>::value)
    return largest_half((const uint16_t *)x, n, half_value<f16>, 0xfc00);
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  F a = splat<F>(-INFINITY), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    a = larger(load_as<F>(x + i), a);
    b = larger(load_as<F>(x + i + W), b);
  }
  Real top = largest_lane<Real>(larger(a, b));
  for (; i < n; i++) top = larger(element<Real>(x, i), top);
  return top;
}

// The first class with a value; n without one.
template <class Real, class S> int64_t find(const S *x, int64_t n, Real value) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    const auto at = [&](int64_t j) { return load_as<F>(x + j) == value; };
    const auto hit = at(i) | at(i + W) | at(i + 2 * W) | at(i + 3 * W);
    int64_t found = 0;
    for (int j = 0; j < W; j++) found |= hit[j];
    if (found) break;
  }
  while (i < n && !(element<Real>(x, i) == value)) i++;
  return i;
}

// full(i, b, o) for each whole vector of the block; last(i, b, o) for a partial one, filled up with masked
// classes; flush() after at most 64 vectors. kAhead: the next block is prefetched meanwhile.
template <class Real, bool kAhead = true, class S, class Full, class Last, class Flush>
KD_HD void each_vector(const Logits<S> &x, Full full, Last last, Flush flush) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  const S *const b = x.base, *const o = x.other;
  const int64_t n = x.n, whole = n / W * W;
  for (int64_t i0 = 0; i0 < whole; i0 += 64 * W) {
    const int64_t end = smaller(i0 + 64 * W, whole);
    for (int64_t i = i0; i < end; i += W) {
      if (kAhead) {
        __builtin_prefetch(o + i + kBlock<Real>);
        __builtin_prefetch(b + i + kBlock<Real>);
      }
      full(i, load_as<F>(b + i), load_as<F>(o + i));
    }
    flush();
  }
  if (whole < n) {
    Real tb[W], to[W];
    for (int j = 0; j < W; j++) tb[j] = to[j] = -INFINITY;
    copy_row(b + whole, n - whole, tb);
    copy_row(o + whole, n - whole, to);
    last(whole, load<F>(tb), load<F>(to));
    flush();
  }
}

// A lane sums at most 64 terms in Real (Sums); everything above is fp64 (Totals, of vectors of doubles).
template <class Real, class Totals> struct Accumulator {
  using I = typename Vec<Real>::I;
  using D = typename Vec<Real>::D;
  Totals totals;
  I farthest{};
  template <class Sums> KD_HD void take(Sums &x) {
    x.each(totals, [](D &to, const auto &from) { to += __builtin_convertvector(from, D); });
    farthest = x.farthest > farthest ? x.farthest : farthest;
    x = Sums{};
  }
  // The sums over all lanes, as doubles.
  template <class Doubles> Doubles get() const {
    Doubles r;
    totals.each(r, [](double &to, const D &from) { to = sum_of<Real>(from); });
    return r;
  }
  // The largest |y|; nan after a class that no finite formula takes.
  Real reach() const {
    auto worst = farthest[0];
    for (int j = 1; j < Vec<Real>::W; j++) worst = farthest[j] > worst ? farthest[j] : worst;
    return from_bits(worst);
  }
};

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

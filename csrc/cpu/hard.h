// The hard term of a block: its sums, and e^{z - top} of each class.
#pragma once
#include "block.h"

namespace kd {
namespace KD_LEVEL {
namespace {

// kSmooth: what label smoothing sums besides.
template <bool kSmooth, class Real, class S> SmoothPart sweep_hard(const S *z, int64_t n, Real *weights) {
  using F = typename Vec<Real>::F;
  using D = typename Vec<Real>::D;
  SmoothPart p;
  const Real top = largest<Real>(z, n);
  p.top = top;
  if (!(std::fabs(p.top) < INFINITY)) {
    std::memset(weights, 0, round_up(n, Vec<Real>::W) * sizeof(Real));
    return p;
  }
  D rest{}, ties{}, below{}, count{};
  F r{}, t{}, b{}, c{};
  const auto full = [&](int64_t i, F vz, F) __attribute__((always_inline)) {
    store(weights + i, step_hard(vz, top, r, t));
    if (kSmooth) {
      const auto there = vz > Real(-INFINITY);
      b += select(there, top - vz, F{});
      c += select(there, splat<F>(1), F{});
    }
  };
  each_vector<Real>(Logits<S>{z, z, n}, full, full, [&]() __attribute__((always_inline)) {
    rest += __builtin_convertvector(r, D);
    ties += __builtin_convertvector(t, D);
    r = F{};
    t = F{};
    if (kSmooth) {
      below += __builtin_convertvector(b, D);
      count += __builtin_convertvector(c, D);
      b = F{};
      c = F{};
    }
  });
  p.below = sum_of<Real>(below);
  p.count = sum_of<Real>(count);
  p.rest = sum_of<Real>(rest) + (sum_of<Real>(ties) - 1);
  p.s = 1 + p.rest;
  return p;
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

// The reference of a block: its top, and a difference near the mean of those of the block.
#pragma once
#include "block.h"

namespace kd {
namespace KD_LEVEL {
namespace {

template <class Real>
Reference<Real> reference_at(const Plan &plan, double top, double at, bool carry, Real reach) {
  const Real ref = Real(at), c = Real(plan.c);
  return {Real(top),
          ref,
          carry ? Real(at - ref) : 0,
          c,
          plan.exact ? Real(plan.c_low) : 0,
          Real(plan.tilt),
          Exp2<Real>::kFloor / c,
          reach,
          plan.base(false, true)};
}

// at_top, the difference o - b at the class with the largest base logit, moved towards the mean difference
// under b, so that what is summed is as small as what is wanted. The mean is estimated from 64 classes spread
// over the block and the top one, which alone decides where it dominates.
template <class Real, class S> double mean_difference(const Logits<S> &x, double k, Real top, double at_top) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W, kVectors = 64 / W;
  const Real at = Real(at_top), c = Real(k * kLog2e);
  F weight{}, mean{};
  for (int i = 0; i < kVectors; i++) {
    const int64_t j = (x.n - W) / kVectors * i;
    const F b = load_as<F>(x.base + j), y = (load_as<F>(x.other + j) - b) - at, a = (b - top) * c;
    const F w = select(y - y == Real(0), exp2_of_product(a, Real(1), Exp2<Real>::kFloor), F{});
    weight += w;
    mean += select(w > Real(0), w * y, F{});
  }
  double w = 0, m = 0;
  for (int j = 0; j < W; j++) {
    w += weight[j];
    m += mean[j];
  }
  const double each = x.n / 64.;  // classes that one of the sample stands for
  return Real(at_top + each * m / (1 + each * w));
}

// To p.top and p.ref. Returns the first class that has the top.
template <class Real, class S> int64_t find_reference(const Logits<S> &x, double k, Part &p) {
  const Real top = largest<Real>(x.base, x.n);
  p.top = top;
  if (top == -INFINITY) {  // no class of the base: what the other has is measured from its own largest
    p.top = largest<Real>(x.other, x.n);
    p.ref = 0;
    return 0;
  }
  if (!std::isfinite(top)) return 0;
  const auto difference_at = [&](int64_t i) {
    return double(element<Real>(x.other, i)) - double(element<Real>(x.base, i));
  };
  const int64_t first = find(x.base, x.n, top);
  p.ref = difference_at(first);
  for (int64_t j = 0; j < x.n && !std::isfinite(p.ref); j++) p.ref = difference_at(j);
  if (!std::isfinite(p.ref)) p.ref = 0;
  if (x.n >= 256) p.ref = mean_difference(x, k, top, p.ref);
  return first;
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

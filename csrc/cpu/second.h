// The second sweep of a block of the mixture family, from the row's own shift and from what the first has
// kept.
#pragma once
#include "sweep.h"

namespace kd {
namespace KD_LEVEL {
namespace {

// The row's shift as a block's reference, put so that one of the first sweep that was right stays as it is.
// missing: what the reference of the first sweep lacked.
template <class Real>
RowReference<Real> row_reference(const Plan &plan, const Part &p, double missing, bool carry) {
  const Reference<Real> first = reference_at<Real>(plan, p.top, p.ref, p.care != kFast, 0);
  const double before = double(first.ref) + first.ref_low;
  const Reference<Real> r = reference_at(plan, p.top, before + missing / plan.k, carry, kReach<Real>);
  return {r, Real((missing - plan.k * ((double(r.ref) + r.ref_low) - before)) * kLog2e)};
}

template <Care kCare, SecondWay kWay, class Real, class S>
void sweep_second_as(const Logits<S> &x, const Plan &plan, const Mixed<Real> &member, double shift,
                     const Block<Mixture, Real> &to) {
  using F = typename Vec<Real>::F;
  using D = typename Vec<Real>::D;
  constexpr bool kCarry = kCare != kFast;
  const Mixed<Real> mix = member;  // a copy, which no store can change
  const KeptArrays<Mixture, Real> kept = to.kept;
  Part &p = *to.part;
  const double missing = shift - p.offset, back = std::exp(-missing), back_1 = std::expm1(-missing);
  const RowReference<Real> at = row_reference<Real>(plan, p, missing, kCarry);
  const Real less = Real(back), less_1 = Real(back_1);
  Accumulator<Real, SecondTerms<D>> total;
  SecondSums<F> s;
  const auto put = [&](int64_t i, F b, F o, auto last) __attribute__((always_inline)) {
    constexpr bool kLast = decltype(last)::value, kMask = kWay == kByClass && (kLast || kCare == kMasked);
    const F e = load<F>(kept.e + i), share = load<F>(kept.share + i) * less + less_1;
    Second<F> k;
    if constexpr (kWay == kByClass)
      k = step_by_class < kCarry, kMask, kMask || kCarry > (b, o, at, mix, e, e + e * share, s);
    else
      k = step_kept<kWay, kLast>(b, o, at, mix, e, share, s);
    if (kMask || !mix.student_base) store(kept.q + i, k.q);  // else it is e
    store(kept.xi + i, k.xi);
  };
  each_vector<Real, false>(
      x, [&](int64_t i, F b, F o) __attribute__((always_inline)) { put(i, b, o, std::false_type{}); },
      [&](int64_t i, F b, F o) __attribute__((always_inline)) { put(i, b, o, std::true_type{}); },
      [&]() __attribute__((always_inline)) { total.take(s); });
  p.second =
      close_kept(kWay, plan.mixture, total.template get<SecondTerms<double>>(), back * p.d + back_1 * p.s);
  if (!(total.reach() <= at.r.reach)) p.care = kLost;
}

template <class Real, class S>
void sweep_second(const Logits<S> &x, const Plan &plan, const Mixed<Real> &mix, const Closed &row,
                  const Block<Mixture, Real> &to) {
  const Part &p = *to.part;
  // The first sweep has seen that y is within reach of its own reference, which is enough for a reference
  // that is not far from it.
  if (p.care == kFast && std::fabs(row.shift - p.offset) < 13) {
    const auto with = [&](auto way) {
      sweep_second_as<kFast, decltype(way)::value>(x, plan, mix, row.shift, to);
    };
    switch (second_way(plan.mixture, row.F)) {
      case kByClass: return with(std::integral_constant<SecondWay, kByClass>{});
      case kTvdGap: return with(std::integral_constant<SecondWay, kTvdGap>{});
      case kReverse: return with(std::integral_constant<SecondWay, kReverse>{});
      case kBothWays: return with(std::integral_constant<SecondWay, kBothWays>{});
      case kOfBase: return with(std::integral_constant<SecondWay, kOfBase>{});
      case kOfOther: return with(std::integral_constant<SecondWay, kOfOther>{});
      case kJoint: return with(std::integral_constant<SecondWay, kJoint>{});
    }
  }
  if constexpr (Half<S>::value)  // the careful forms exist for Real alone
    sweep_second(widened(x, to.wide_base, to.wide_other), plan, mix, row, to);
  else if (p.care == kExact)
    sweep_second_as<kExact, kByClass>(x, plan, mix, row.shift, to);
  else
    sweep_second_as<kMasked, kByClass>(x, plan, mix, row.shift, to);
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

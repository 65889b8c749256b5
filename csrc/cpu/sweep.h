// The first sweep of a block: its sums and what it keeps, with as much care as the block turns out to need.
#pragma once
#include "kept.h"
#include "reference.h"

namespace kd {
namespace KD_LEVEL {
namespace {

// A block's StatPart, from its sums and the largest logits of the other.
template <Logs kLogs, class Real>
void put_logs(const LogSums<double> &sums, typename Vec<Real>::F top_o, const Plan &plan, const Part &p,
              StatPart &stats) {
  stats.log_b = sums.log_b * plan.k;
  stats.log_o = sums.log_o * plan.k;
  stats.rest = sums.others + (sums.ties > 0 ? sums.ties - 1 : 0);
  stats.top_o = largest_lane<Real>(top_o);
  if (kLogs == kBriefLogs) stats.log_o = other_log(p, stats.log_b, stats.log_o);
}

template <Care kCare, bool kStats, class Family, class Real, class S>
void sweep_as(const Logits<S> &x, const Plan &plan, const Block<Family, Real> &to) {
  using F = typename Vec<Real>::F;
  using I = typename Vec<Real>::I;
  using D = typename Vec<Real>::D;
  constexpr bool kCarry = kCare != kFast;
  constexpr Logs kLogs = !kStats ? kNoLogs : kCare == kMasked ? kBothLogs : kBriefLogs;
  const Real reach = kReach<Real> / Real(larger(1., std::fabs(plan.tilt)));
  Part &p = *to.part;
  const Reference<Real> r = reference_at(plan, p.top, p.ref, kCarry, reach);
  const KeptArrays<Family, Real> kept = to.kept;
  Accumulator<Real, typename Family::template Sums<D>> total;
  LogSums<D> logs;
  FirstSums<Family, F> s;
  F top_o = splat<F>(-INFINITY);
  I lone{};
  const auto put = [&](int64_t i, F b, F o, const auto &k) __attribute__((always_inline)) {
    if (kStats) top_o = larger(o, top_o);
    if (kCare == kMasked) lone |= (b == Real(-INFINITY)) ^ (o == Real(-INFINITY));
    kept.put(i, k);
  };
  each_vector<Real>(
      x,
      [&](int64_t i, F b, F o) __attribute__((always_inline)) {
        put(i, b, o, step<Family, kCarry, kCare == kMasked, kLogs>(b, o, r, s));
      },
      [&](int64_t i, F b, F o) __attribute__((always_inline)) {
        put(i, b, o, step<Family, kCarry, true, kLogs>(b, o, r, s));
        if (kCare != kMasked)  // a class that only one of the two has is one for kMasked
          s.farthest = (b == Real(-INFINITY)) ^ (o == Real(-INFINITY)) ? I{} + Exp2<Real>::kAbs : s.farthest;
      },
      [&]() __attribute__((always_inline)) {
        if (kStats) s.logs.each(logs, [](D &to, const F &from) { to += __builtin_convertvector(from, D); });
        total.take(s);
      });
  Family::store(total.template get<typename Family::template Sums<double>>(), p);
  p.offset = plan.k * (double(r.ref) + r.ref_low);
  if (kStats) {
    LogSums<double> sums;
    logs.each(sums, [](double &to, const D &from) { to = sum_of<Real>(from); });
    put_logs<kLogs, Real>(sums, top_o, plan, p, *to.stats);
  }
  p.care = total.reach() <= reach ? int(kCare) : int(kLost);
  p.lone = !none_of(lone);
}

template <class Family, class Real, class S>
void sweep(int care, const Logits<S> &x, const Plan &plan, const Block<Family, Real> &to) {
  const auto with = [&](auto form) {
    constexpr Care kCare = decltype(form)::value;
    if (to.stats)
      sweep_as<kCare, true>(x, plan, to);
    else
      sweep_as<kCare, false>(x, plan, to);
  };
  if (care == kFast) return with(std::integral_constant<Care, kFast>{});
  if constexpr (Half<S>::value)  // the careful forms exist for Real alone
    sweep(care, widened(x, to.wide_base, to.wide_other), plan, to);
  else if (care == kExact)
    with(std::integral_constant<Care, kExact>{});
  else
    with(std::integral_constant<Care, kMasked>{});
}

// Whether the rounding of 16-bit differences is more than 1e-7 of what the block adds to D, `own` for each of
// its s. Their rounding errors are of a few classes, or, where one of the rows is near 0 and the other is
// not, of all and alike, so that they do not average out.
template <class Real, class S>
bool rounding_shows(const Logits<S> &x, const Real *e, double k, double s, double own) {
  using F = typename Vec<Real>::F;
  typename Vec<Real>::D total{};
  F sum{};
  const auto add = [&](int64_t i, F b, F o) __attribute__((always_inline)) {
    const F lost = lost_in_difference(o, b), weight = load<F>(e + i);
    sum += select(weight > F{}, weight * lost * lost, F{});
  };
  each_vector<Real, false>(x, add, add, [&]() __attribute__((always_inline)) {
    total += __builtin_convertvector(sum, typename Vec<Real>::D);
    sum = F{};
  });
  return k * k * sum_of<Real>(total) > 5e-15 * own * s;
}

// Whether a block that kFast has swept asks for kExact. The rounding of o - b, 2^-24 of the offset, must stay
// under 1e-6 of the differences that remain; 16-bit logits seldom have any. `own` is the block's D, for each
// of its s, at the reference that suits it best, about half the mean square of y there: off > 16 |y| is asked
// for.
template <class Family, class Real, class S>
bool needs_exact(const Logits<S> &x, const Plan &plan, const Block<Family, Real> &to) {
  const Part &p = *to.part;
  const double d = p.d / p.s, own = p.first.psi / p.s - (d - std::log1p(d)), off = plan.k * p.ref;
  if (!(off * off > 512 * own)) return false;
  if constexpr (Half<S>::value) return rounding_shows(x, to.kept.e, plan.k, p.s, own);
  return true;
}

template <class Real, class S> bool has_nan(const Logits<S> &x) {
  for (int64_t i = 0; i < x.n; i++) {
    const Real b = element<Real>(x.base, i), o = element<Real>(x.other, i);
    if (b != b || o != o) return true;
  }
  return false;
}

// A block from its logits. ref: the row's own reference, null for one of the block's.
template <class Family, class Real, class S>
void measure_block(const Logits<S> &x, const Plan &plan, const double *ref, const Block<Family, Real> &to) {
  Part &p = *to.part;
  p = Part();
  if (to.stats) *to.stats = StatPart();
  const int64_t first = find_reference<Real>(x, plan.k, p);
  if (to.stats) to.stats->first_b = first;
  if (ref) p.ref = *ref;
  if (p.top == -INFINITY) {  // no class at all, unless a nan hides there
    if (has_nan<Real>(x)) p.care = kLost;
    return;
  }
  if (!std::isfinite(p.top)) {
    p.care = kLost;
    return;
  }
  sweep(plan.exact && !Half<S>::value ? kExact : kFast, x, plan, to);
  if (p.care == kLost) return sweep(kMasked, x, plan, to);
  // brief logs cancel where the references were far off and little of the other is left
  if (to.stats && p.s + p.d < .25 * p.s) {
    sweep(kMasked, x, plan, to);
    if (p.care == kMasked) p.care = kExact;  // which is the same without masks
    return;
  }
  if (p.care == kFast && needs_exact(x, plan, to)) sweep(kExact, x, plan, to);
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

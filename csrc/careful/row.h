// The rows that the sweeps of row/ cannot take, in fp64: differences beyond the range of a float exponential
// (low temperatures, large orders), divergences that are +inf, rows with nan, and orders 0 and inf. Slower,
// rare, and right for every input.
//
// Textbook order, in phases: the largest logits; the sums of both softmaxes; what the divergence sums
// besides; then the gradient, class by class, from what the phases left. The first two are here, for every
// divergence; power.h, mixture.h and orders.h have the others, and moments.h takes T = inf.
//
// F is a vector of doubles padded with -inf (a class masked in both rows counts for nothing, so there are no
// tails) or one double of a GPU's thread. A Crew gives sums and maxima over all lanes. classes(f) calls f(z,
// v) for every class of the row.
#pragma once
#include "../row/row.h"

namespace kd {
namespace KD_LEVEL {

template <class F> KD_HD F abs_of(F x) { return from_bits(bits(x) & Exp2<double>::kAbs); }
template <class F> KD_HD F exp2_flushed(F x) { return exp2_of_product(x, 1., Exp2<double>::kFloor); }
// expm1_psi of an argument in natural units; outside |x| < 1/2, where it is not used, that of 0.
template <class F, class Mask> KD_HD ExpM1<F> near_zero(F x, Mask near) {
  return expm1_psi(select(near, x, F{}) * kLog2e);
}
template <class F> KD_HD IntOf<F> masked(F x) { return x == -INFINITY; }

template <class F, class Crew> class CarefulRow {
 public:
  using Int = IntOf<F>;
  KD_HD CarefulRow(const Plan &plan, const Crew &crew) : plan_(plan), crew_(crew), k_(plan.k) {}

  // After measure: the student's row has nan or +inf, or no class, which breaks its hard term as well.
  KD_HD bool broken_student() const { return broken_student_; }

  // After measure.
  template <class Classes> KD_HD Entropies entropies(Classes classes) const {
    if (broken_) return {NAN, NAN, NAN, NAN};
    F sz{}, sv{}, log_z{}, log_v{};
    classes([&](F z, F v) {
      const Int no_z = masked(z), no_v = masked(v);
      const F a = select(no_z, F{}, (z - top_z_) * k_), b = select(no_v, F{}, (v - top_v_) * k_);
      const F ez = select(no_z, F{}, exp2_flushed(a * kLog2e)),
              ev = select(no_v, F{}, exp2_flushed(b * kLog2e));
      sz += ez;
      sv += ev;
      log_z += select(ez > 0., ez * a, F{});
      log_v += select(ev > 0., ev * b, F{});  // a and b may be -inf
    });
    const double z = crew_.sum(sz), v = crew_.sum(sv), lse_z = log_of(z), lse_v = log_of(v);
    return {lse_z + k_ * top_z_, lse_v + k_ * top_v_, lse_z - crew_.sum(log_z) / z,
            lse_v - crew_.sum(log_v) / v};
  }

 protected:
  // Phase 1: the largest logits. False: one of the rows is broken (nan, +inf, no class).
  template <class Classes> KD_HD bool find_tops(Classes classes) {
    F mz = splat<F>(-INFINITY), mv = mz;
    Int nan_z{}, nan_v{};
    classes([&](F z, F v) {
      mz = larger(z, mz);
      mv = larger(v, mv);
      nan_z |= z != z;
      nan_v |= v != v;
    });
    top_z_ = crew_.largest(mz);
    top_v_ = crew_.largest(mv);
    broken_student_ = crew_.any(nan_z) || !std::isfinite(top_z_);
    broken_ = crew_.any(nan_v) || !std::isfinite(top_v_) || broken_student_;
    apart_ = top_z_ - top_v_;
    if (std::fabs(apart_) > kFarthest) {
      base_z_ = top_z_;
      base_v_ = top_v_;
      apart_ = 0;
    }
    return !broken_;
  }

  // Phase 2: the sums of both softmaxes, the shift between them, and whether one has classes that the other
  // has not. also(z, v, ez, ev) sums what else the divergence wants.
  template <class Classes, class Also> KD_HD void find_softmaxes(Classes classes, Also also) {
    F sz{}, sv{}, sd{};
    Int lone_p{}, lone_q{};
    classes([&](F z, F v) {
      const Int no_z = masked(z), no_v = masked(v);
      lone_p |= no_z & ~no_v;
      lone_q |= no_v & ~no_z;
      const F ez = exp_z(z), ev = exp_v(v), y = diff(z, v) * plan_.c;
      const Int near = (abs_of(y) < .5) & ~(no_z | no_v);
      sz += ez;
      sv += ev;
      sd += select(near, ev * expm1_psi(select(near, y, F{})).m1, ez - ev);
      also(z, v, ez, ev);
    });
    sum_z_ = crew_.sum(sz);
    sum_v_ = crew_.sum(sv);
    const double d = crew_.sum(sd);
    inv_z_ = 1 / sum_z_;
    inv_v_ = 1 / sum_v_;
    shift_ = std::fabs(d) < .5 * sum_v_ ? log1p_of(d / sum_v_) : log_of(sum_z_) - log_of(sum_v_);
    has_lone_p_ = crew_.any(lone_p);
    has_lone_q_ = crew_.any(lone_q);
  }

  KD_HD F exp_z(F z) const { return exp2_flushed((z - top_z_) * plan_.c); }
  KD_HD F exp_v(F v) const { return exp2_flushed((v - top_v_) * plan_.c); }
  // z - v. Where the rows lie far apart, one of them being a mask of 1e30 or more as a whole, a difference
  // keeps no digit of the other: each logit is then measured from its own row's largest.
  KD_HD F gap(F z, F v) const { return (z - base_z_) - (v - base_v_); }
  // z - v less what it is between the largest logits, 0 where a class is masked. A logit may be the least
  // finite number (a mask of many models): it is scaled last, as a sum of scaled numbers could be inf - inf.
  KD_HD F diff(F z, F v) const { return select(masked(z) | masked(v), F{}, gap(z, v) - apart_); }
  KD_HD F log_ratio(F z, F v) const { return diff(z, v) * k_ - shift_; }

  const Plan &plan_;
  const Crew &crew_;
  const double k_;
  double base_z_ = 0, base_v_ = 0, apart_ = 0, top_z_ = 0, top_v_ = 0;  // phase 1
  double sum_z_ = 0, sum_v_ = 0, inv_z_ = 0, inv_v_ = 0, shift_ = 0;    // phase 2
  bool has_lone_p_ = false, has_lone_q_ = false;
  bool broken_ = false, broken_student_ = false;
};

}  // namespace KD_LEVEL
}  // namespace kd

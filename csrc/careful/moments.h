// T = inf and logit matching, in fp64: the mean and the variance of z - v over the classes that both rows
// have.
//     value = k/2 sum (z - v - mean)^2 / n        gradient = k (z - v - mean) / n
// Logit matching takes no mean off. A row's softmaxes are uniform. The same interface as that of the
// other rows in fp64 (row.h).
#pragma once
#include "row.h"

namespace kd {
namespace KD_LEVEL {

template <class F, class Crew> class Moments {
 public:
  using Int = IntOf<F>;
  KD_HD Moments(const Plan &p, const Crew &crew) : plan_(p), crew_(crew) {}

  // classes(f) calls f(z, v) for every class of the row.
  template <class Classes> KD_HD double measure(Classes classes) {
    F top_z = splat<F>(-INFINITY), top_v = top_z, count{}, sum{}, square{};
    Int nan_z{}, nan_v{}, lone_p{}, lone_q{};
    classes([&](F z, F v) {
      top_z = larger(z, top_z);
      top_v = larger(v, top_v);
      nan_z |= z != z;
      nan_v |= v != v;
      lone_p |= masked(z) & ~masked(v);
      lone_q |= masked(v) & ~masked(z);
      count += select(masked(z) | masked(v), F{}, splat<F>(1));
    });
    const double z = crew_.largest(top_z), v = crew_.largest(top_v);
    broken_student_ = crew_.any(nan_z) || !std::isfinite(z);
    broken_ = crew_.any(nan_v) || !std::isfinite(v) || broken_student_;
    if (broken_) return NAN;
    // Rows that lie far apart, one of them masked by 1e30 or more as a whole: a difference keeps no digit of
    // the other, unless each logit is measured from its own row's largest.
    if (plan_.centered && std::fabs(z - v) > kFarthest) {
      base_z_ = z;
      base_v_ = v;
    }
    each_ = 1 / larger(crew_.sum(count), 1.);
    if (plan_.centered) {
      classes([&](F z, F v) { sum += gap(z, v); });
      mean_ = crew_.sum(sum) * each_;
    }
    classes([&](F z, F v) { square += gap(z, v) * gap(z, v); });
    const bool has_lone_p = crew_.any(lone_p), has_lone_q = crew_.any(lone_q);
    // order 0 asks only whose support it is
    if (plan_.careful == CarefulKind::kMomentsOfOrderZero)
      return (plan_.reverse ? has_lone_p : has_lone_q) ? INFINITY : 0;
    if (has_lone_p || has_lone_q) return INFINITY;
    return plan_.factor * crew_.sum(square) * each_ / 2;
  }

  KD_HD bool broken_student() const { return broken_student_; }

  template <class Classes> KD_HD Entropies entropies(Classes classes) const {
    if (broken_) return {NAN, NAN, NAN, NAN};
    F of_z{}, of_v{};
    classes([&](F z, F v) {
      of_z += select(masked(z), F{}, splat<F>(1));
      of_v += select(masked(v), F{}, splat<F>(1));
    });
    const double z = log_of(crew_.sum(of_z)), v = log_of(crew_.sum(of_v));
    return {z, v, z, v};
  }

  KD_HD F gradient(F z, F v) const { return broken_ ? splat<F>(NAN) : gap(z, v) * (each_ * plan_.factor); }

 private:
  KD_HD F gap(F z, F v) const {
    return select(masked(z) | masked(v), F{}, (z - base_z_) - (v - base_v_) - mean_);
  }

  const Plan &plan_;
  const Crew &crew_;
  double base_z_ = 0, base_v_ = 0, mean_ = 0, each_ = 0;
  bool broken_ = false, broken_student_ = false;
};

}  // namespace KD_LEVEL
}  // namespace kd

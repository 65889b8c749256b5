// Orders 0 and inf in fp64, which have no sum of terms.
#pragma once
#include "row.h"

namespace kd {
namespace KD_LEVEL {

// Order 0: -log of what q has of p's support. reverse: the two exchanged.
template <class F, class Crew> class CarefulOrderZero : public CarefulRow<F, Crew> {
  using Base = CarefulRow<F, Crew>;
  using Int = IntOf<F>;

 public:
  using Base::Base;

  template <class Classes> KD_HD double measure(Classes classes) {
    if (!this->find_tops(classes)) return NAN;
    const bool reverse = this->plan_.reverse;
    F out{}, in{};
    this->find_softmaxes(classes, [&](F z, F v, F ez, F ev) {
      const F own = reverse ? ev : ez;
      const Int outside = reverse ? masked(z) : masked(v);
      out += select(outside, own, F{});
      in += select(outside, F{}, own);
    });
    const double outside = this->crew_.sum(out), inside = this->crew_.sum(in);
    ratio_ = inside > 0 ? outside / inside : 0;
    return inside > 0 ? log1p_of(ratio_) : INFINITY;
  }

  // T dD/dz of a class: q - w, with w q restricted to p's support.
  KD_HD F gradient(F z, F v) const {
    if (this->broken_) return splat<F>(NAN);
    if (this->plan_.reverse) return F{};
    const F q = this->exp_z(z) * this->inv_z_;
    return select(masked(v), q, -q * ratio_);
  }

 private:
  double ratio_ = 0;
};

// Order inf: the largest log(p / q). reverse: the two exchanged.
template <class F, class Crew> class CarefulOrderInf : public CarefulRow<F, Crew> {
  using Base = CarefulRow<F, Crew>;
  using Int = IntOf<F>;

 public:
  KD_HD CarefulOrderInf(const Plan &plan, const Crew &crew)
      : Base(plan, crew), sign_(plan.reverse ? -1 : 1) {}

  template <class Classes> KD_HD double measure(Classes classes) {
    if (!this->find_tops(classes)) return NAN;
    const bool reverse = this->plan_.reverse;
    F least_gap = splat<F>(INFINITY);
    this->find_softmaxes(classes, [&](F z, F v, F, F) {
      const Int outside = reverse ? masked(z) : masked(v);
      const F least = select(outside, splat<F>(INFINITY), this->gap(z, v) * sign_);
      least_gap = select(least < least_gap, least, least_gap);
    });
    least_ = -this->crew_.largest(-least_gap);
    const bool lone = reverse ? this->has_lone_q_ : this->has_lone_p_;
    find_set(classes, lone);
    const double extreme = sign_ * this->shift_ - (least_ - sign_ * this->apart_) * this->k_;
    return lone ? INFINITY : larger(extreme, 0.);
  }

  // T dD/dz of a class: q - w, with w q restricted to the classes where log(p / q) is largest.
  KD_HD F gradient(F z, F v) const {
    if (this->broken_) return splat<F>(NAN);
    const F q = this->exp_z(z) * this->inv_z_;
    return select(masked(z), F{}, select(chosen(z, v), -exp_set(z) * in_set_, q)) * sign_;
  }

 private:
  // q over the set where the difference is smallest (reversed: largest), relative to its own largest: all of
  // it may be far below the row's.
  template <class Classes> KD_HD void find_set(Classes classes, bool lone) {
    F top = splat<F>(-INFINITY), set{};
    classes([&](F z, F v) { top = select(chosen(z, v), larger(z, top), top); });
    top_set_ = this->crew_.largest(top);
    classes([&](F z, F v) { set += select(chosen(z, v), exp_set(z), F{}); });
    const double inside = this->crew_.sum(set),
                 rest = this->sum_z_ - inside * exp_of((top_set_ - this->top_z_) * this->k_);
    in_set_ = lone ? 0 : rest / inside * this->inv_z_;
  }
  KD_HD F exp_set(F z) const { return exp2_flushed((z - top_set_) * this->plan_.c); }
  KD_HD Int chosen(F z, F v) const { return (this->gap(z, v) * sign_ == least_) & ~(masked(z) | masked(v)); }

  const double sign_;
  double least_ = 0, top_set_ = 0, in_set_ = 0;
};

}  // namespace KD_LEVEL
}  // namespace kd

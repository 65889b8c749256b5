// The power family in fp64 (math/power.h): KL, the cross entropy, and every order but 0 and inf.
#pragma once
#include "row.h"

namespace kd {
namespace KD_LEVEL {

template <class F, class Crew> class CarefulPower : public CarefulRow<F, Crew> {
  using Base = CarefulRow<F, Crew>;
  using Int = IntOf<F>;

 public:
  KD_HD CarefulPower(const Plan &plan, const Crew &crew)
      : Base(plan, crew), tilted_(plan.family == FamilyKind::kTilted), b_(1 - plan.order) {}

  template <class Classes> KD_HD double measure(Classes classes) {
    const Plan &plan = this->plan_;
    if (!this->find_tops(classes)) return NAN;
    F top_u = splat<F>(-INFINITY);
    this->find_softmaxes(classes, [&](F z, F v, F, F) {
      if (tilted_) top_u = larger(exponent(z, v), top_u);
    });
    top_u_ = this->crew_.largest(top_u);
    const bool disjoint = !std::isfinite(top_u_);
    if (plan.alpha && plan.order > 0 && plan.order < 1 && disjoint) {
      gain_ = 0;
      infinite_ = true;
      return plan.factor / (plan.order * b_);
    }
    infinite_ = plan.order >= 1 ? this->has_lone_p_ : plan.order < 0 ? this->has_lone_q_ : disjoint;
    find_weights(classes);
    if (infinite_) {
      log_r_ = 0;
      gain_ = plan.alpha ? NAN : plan.factor;
      return INFINITY;
    }
    return value_of(sum_terms(classes));
  }

  // T dD/dz of a class: q - w, times the gain.
  KD_HD F gradient(F z, F v) const {
    if (this->broken_) return splat<F>(NAN);
    const Plan &plan = this->plan_;
    const Int no_z = masked(z), no_v = masked(v);
    const F q = this->exp_z(z) * this->inv_z_, p = this->exp_v(v) * this->inv_v_, d = this->log_ratio(z, v);
    const bool plain = !tilted_ || infinite_;
    const F w = plain ? p : weight(z, v) * inv_u_;
    // log(w / p), or log(w / q), which is 0 as the order goes to 0
    const F x = plain ? F{} : plan.base(-plan.order * d - log_r_, b_ * d - log_r_);
    const bool of_q = !plain && plan.student_base;
    // of a large d little is left in x
    const Int small = of_q ? abs_of(plan.order * d) < 8. : abs_of(d) < .5,
              near = small & (abs_of(x) < .5) & ~(no_z | no_v);
    const F m1 = near_zero(x, near).m1,
            g = select(near, of_q ? -q * m1 : p * (near_zero(d, near).m1 - m1), q - w);
    return select(no_z, F{}, g * gain_);  // a masked class of the student is not moved
  }

 private:
  static constexpr double kMost = 1e308;  // the largest exponent that is told from others

  // The base-2 exponent of p^a q^(1-a), up to the constants of the row; never +inf, so that classes compare.
  KD_HD F exponent(F z, F v) const {
    // orders above 1 with z masked are +inf anyway
    const Int dead = masked(v) | masked(z);
    const F all = ((v - this->top_v_) + b_ * this->diff(z, v)) * this->plan_.c;
    return select(dead, splat<F>(-INFINITY), select(all > kMost, splat<F>(kMost), all));
  }
  // t of a class in units of the largest; of KL, e of the teacher.
  KD_HD F weight(F z, F v) const { return tilted_ ? exp2_flushed(exponent(z, v) - top_u_) : this->exp_v(v); }

  // Phase 3: the sum of the weights, and log R.
  template <class Classes> KD_HD void find_weights(Classes classes) {
    F u{};
    classes([&](F z, F v) { u += weight(z, v); });
    const double sum = tilted_ && !infinite_ ? this->crew_.sum(u) : 1;
    inv_u_ = 1 / sum;
    log_r_ = tilted_ ? top_u_ * kLn2 + log_of(sum) - log_of(this->sum_v_) - b_ * this->shift_ : 0;
  }

  // Phase 4: F.
  template <class Classes> KD_HD double sum_terms(Classes classes) {
    const double R = exp_of(log_r_);
    F terms{};
    classes([&](F z, F v) {
      const F p = this->exp_v(v) * this->inv_v_, q = this->exp_z(z) * this->inv_z_, d = this->log_ratio(z, v);
      terms += select(masked(z) & masked(v), F{},
                      tilted_ ? tilted_term(z, v, p, q, d, R) : plain_term(v, p, q, d));
    });
    return larger(this->crew_.sum(terms), 0.);
  }
  KD_HD F plain_term(F v, F p, F q, F d) const {
    const Int near = abs_of(d) < .5;
    const F series = near_zero(d, near).psi,
            term = select(near, p * series, (q - p) - select(p > 0., p * d, F{}));  // d may be inf
    return select(masked(v), q, term);
  }
  KD_HD F tilted_term(F z, F v, F p, F q, F d, double R) const {
    const Plan &plan = this->plan_;
    const double tilt = plan.base(plan.order, b_);
    const F base = plan.base(q, p), other = plan.other(q, p), x = plan.base(-d, d);
    const Int near = abs_of(d) * larger(1., std::fabs(tilt)) < .5, close = abs_of(tilt * x) < .5;
    const ExpM1<F> m = near_zero(tilt * x, close);
    const F powers = select(close, base * m.m1, weight(z, v) * inv_u_ * R - base);
    const F term =
        select(near, base * (near_zero(x, near).psi - m.psi / tilt), (other - base) - powers / tilt) /
        (1 - tilt);
    return select(masked(v), q / plan.order, select(masked(z), p / b_, term));
  }

  KD_HD double value_of(double terms) {
    const Plan &plan = this->plan_;
    gain_ = plan.factor;
    if (!tilted_) return plan.factor * terms;
    const double R = exp_of(log_r_);
    if (near_one(R)) log_r_ = log1p_of(-b_ * plan.order * terms);
    if (!plan.alpha) return top_u_ < kMost ? plan.factor * log_r_ / -b_ : INFINITY;
    gain_ = plan.factor * (exp_of(log_r_) / plan.order);
    return plan.factor * (near_one(R) ? terms : expm1_of(log_r_) / (-b_ * plan.order));
  }

  const bool tilted_;
  const double b_;  // 1 - order
  double top_u_ = 0, inv_u_ = 1, log_r_ = 0, gain_ = 1;
  bool infinite_ = false;
};

}  // namespace KD_LEVEL
}  // namespace kd

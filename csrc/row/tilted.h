// The power family beside KL, of every order but 0, 1 and inf (math/power.h): as Plain (plain.h), and with
// the tilted weights t = b e^{tilt x}, for which each class has et = e expm1(tilt y) too:
//     q - w = A em + B et + C e
#pragma once
#include "plain.h"

namespace kd {
namespace KD_LEVEL {

struct Tilted {
  static constexpr bool kTwice = false;
  static constexpr int kNumbers = 2;  // kept of a class, besides e

  template <class F> struct Terms { F e, em, psi, et, psi_tilted; };
  template <class F> struct Kept { F e, em, et; };
  template <class F> struct Sums {
    F s{}, d{}, psi{}, psi_tilted{}, weights{};
    template <class Op, class To> KD_HD void each(To &to, Op op) const {
      op(to.s, s);
      op(to.d, d);
      op(to.psi, psi);
      op(to.psi_tilted, psi_tilted);
      op(to.weights, weights);
    }
  };

  template <class F> static KD_HD Terms<F> terms(F e, F y, const Reference<RealOf<F>> &r) {
    const ExpM1<F> m = expm1_psi(y), mt = expm1_psi(y * r.tilt);
    return {e, e * m.m1, e * m.psi, e * mt.m1, e * mt.psi};
  }
  // As limits the terms of F stay finite where only one of the two has the class, but for tilt < 0 where only
  // the base has it.
  template <class F>
  static KD_HD IntOf<F> take_lone(Terms<F> &x, const Lone<F> &lone, const Reference<RealOf<F>> &r) {
    using Real = RealOf<F>;
    x.em = select(lone.only_b, -x.e, select(lone.only_o, lone.o_weight, x.em));
    x.psi = select(lone.only_b, F{}, select(lone.only_o, lone.o_weight, x.psi));
    x.et = select(lone.only_b, -x.e, x.et);
    x.psi_tilted = select(lone.only_b, (r.tilt - Real(1)) * x.e, x.psi_tilted);
    IntOf<F> lost = lone.only_o & ~lone.within;
    if (r.tilt < 0) lost |= lone.only_b;
    return lost;
  }
  template <class F> static KD_HD void add(const Terms<F> &x, Sums<F> &s) {
    s.s += x.e;
    s.d += x.em;
    s.psi += x.psi;
    s.psi_tilted += x.psi_tilted;
    s.weights += x.e + x.et;
  }
  // A class that the student masks counts in the sums and has no gradient.
  template <class F> static KD_HD void hide(Terms<F> &x, IntOf<F> no_o, const Reference<RealOf<F>> &r) {
    if (!r.other_is_student) return;
    x.e = select(no_o, F{}, x.e);
    x.em = select(no_o, F{}, x.em);
    x.et = select(no_o, F{}, x.et);
  }
  template <class F> static KD_HD Kept<F> keep(const Terms<F> &x) { return {x.e, x.em, x.et}; }
  static KD_HD void store(const Sums<double> &s, Part &p) {
    p.s = s.s;
    p.d = s.d;
    p.first = {s.psi, s.psi_tilted, s.weights};
  }

  // F_block e^{-tilt h} + s f(-h) + d (expm1(-h) - expm1(-tilt h)) / (1 - tilt), where the two expm1 of the
  // last term are not subtracted, as both may be -1.
  static KD_HD BlockF of_block(const Part &p, double h, const Plan &plan) {
    const double b = plan.tilt;
    const double still = h == 0 ? 0 : p.s * f_of(-h, b), all = exp_of(-b * h);
    return {all * (p.first.psi - p.first.psi_tilted / b) / (1 - b), still,
            p.d * all * expm1_of(-(1 - b) * h) / (1 - b), p.unit * all * p.first.weights};
  }
  static KD_HD void put_R(Closed &r, double R) { r.R = R; }
  static KD_HD bool may_refine(const Closed &r) { return near_one(r.R); }
  static KD_HD void put_value(Closed &r, const Plan &plan) {
    r.log_r = log_of_R(r.F, r.R, plan.tilt);
    r.gain = plan.factor * (plan.alpha ? exp_of(r.log_r) / plan.order : 1);
    if (plan.alpha)
      r.value = near_one(r.R) ? r.F : expm1_of(r.log_r) / (plan.order * (plan.order - 1));
    else
      r.value = r.log_r / (plan.order - 1);
    r.value *= plan.factor;
  }
  static KD_HD Coefficients coefficients(const Part &p, const Closed &r, const Plan &plan, double scale) {
    const double unit = p.unit * scale * r.gain, h = r.shift - p.offset;
    // The branch, whose two sides are equal at h = 0, has C rounded before anything is taken off it.
    const double C = h == 0 ? -h : unit * expm1_of(-h);
    const double bh = plan.tilt * h, B = -unit * exp_of(-bh - r.log_r), less = unit * expm1_of(-bh - r.log_r);
    if (plan.student_base) return {0, B, -less};
    return {unit * exp_of(-h), B, C - less};
  }
};

}  // namespace KD_LEVEL
}  // namespace kd

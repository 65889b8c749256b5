// The family of KL and the cross entropy: its sums, what it keeps of a class, its value and its gradient.
//
// With the teacher as the base, e = e^{(b - top)/T}, y = ((o - b) - ref)/T and h = shift - offset what y
// still has to lose in the row:
//     em = e expm1(y)        F = sum u (e psi(y) + s psi(-h) + d expm1(-h))        q - p = A em + C e
// with u the block's unit, A = u e^{-h} and C = u expm1(-h).
#pragma once
#include "part.h"

namespace kd {
namespace KD_LEVEL {

// A class, or a vector of them, that only one of the two distributions may have. o_weight: e of the other
// measured from the base's top; within: the other is in reach from there.
template <class F> struct Lone {
  IntOf<F> only_b, only_o, within;
  F o_weight;
};

// F of a block in units of its row, in three terms: its own sum of e psi(y); s psi(-h), which is left when
// only the reference was off; and d expm1(-h), which alone may be negative. And its sum of the weights t.
struct BlockF { double own, still, cross, weights; };

struct Plain {
  static constexpr bool kTwice = false;  // its rows are swept once
  static constexpr int kNumbers = 1;     // kept of a class, besides e

  template <class F> struct Terms { F e, em, psi; };
  template <class F> struct Kept { F e, em; };
  template <class F> struct Sums {
    F s{}, d{}, psi{};
    template <class Op, class To> KD_HD void each(To &to, Op op) const {
      op(to.s, s);
      op(to.d, d);
      op(to.psi, psi);
    }
  };

  template <class F> static KD_HD Terms<F> terms(F e, F y, const Reference<RealOf<F>> &) {
    const ExpM1<F> m = expm1_psi(y);
    return {e, e * m.m1, e * m.psi};
  }
  // The limits for p = 0 < q; where q = 0 < p, F is infinite. Returns the classes that no finite formula
  // takes.
  template <class F>
  static KD_HD IntOf<F> take_lone(Terms<F> &x, const Lone<F> &lone, const Reference<RealOf<F>> &) {
    x.em = select(lone.only_o, lone.o_weight, x.em);
    x.psi = select(lone.only_o, lone.o_weight, x.psi);
    return (lone.only_o & ~lone.within) | lone.only_b;
  }
  template <class F> static KD_HD void add(const Terms<F> &x, Sums<F> &s) {
    s.s += x.e;
    s.d += x.em;
    s.psi += x.psi;
  }
  template <class F> static KD_HD void hide(Terms<F> &, IntOf<F>, const Reference<RealOf<F>> &) {}
  template <class F> static KD_HD Kept<F> keep(const Terms<F> &x) { return {x.e, x.em}; }
  static KD_HD void store(const Sums<double> &s, Part &p) {
    p.s = s.s;
    p.d = s.d;
    p.first.psi = s.psi;
  }

  static KD_HD BlockF of_block(const Part &p, double h, const Plan &) {
    // 0 where the block's reference was the row's shift. The branch also has the product rounded before it is
    // added, on every compiler.
    const double still = h == 0 ? 0 : p.s * psi(-h);
    return {p.first.psi, still, p.d * expm1_of(-h), 0};
  }
  static KD_HD void put_R(Closed &, double) {}
  static KD_HD bool may_refine(const Closed &) { return true; }
  static KD_HD void put_value(Closed &r, const Plan &plan) {
    r.gain = plan.factor;
    r.value = plan.factor * r.F;
  }
  static KD_HD Coefficients coefficients(const Part &p, const Closed &r, const Plan &, double scale) {
    const double unit = p.unit * scale * r.gain, h = r.shift - p.offset;
    return {unit * exp_of(-h), 0, unit * expm1_of(-h)};
  }
};

}  // namespace KD_LEVEL
}  // namespace kd

// The mixture family and TVD (math/mixture.h). Their first sweep is KL's (plain.h), from which comes the
// row's shift. From there y is x itself, and the second sweep finds D's terms and each class's q and xi:
//     T dD/dz = q (A xi + C)        A = u, C = -u M, M = sum u q xi
#pragma once
#include "plain.h"

namespace kd {
namespace KD_LEVEL {

struct Mixture : Plain {
  static constexpr bool kTwice = true;

  template <class F> struct Terms : Plain::Terms<F> { F share; };
  template <class F> struct Kept { F e, share; };  // share = e^y - 1

  // psi is only for the row's shift and reference: it may lose digits.
  template <class F> static KD_HD Terms<F> terms(F e, F y, const Reference<RealOf<F>> &) {
    const ExpM1<F> m = expm1_psi(y);
    return {{e, e * m.m1, e * (m.m1 - y * RealOf<F>(kLn2))}, m.m1};
  }
  template <class F> static KD_HD Kept<F> keep(const Terms<F> &x) { return {x.e, x.share}; }
  static KD_HD Coefficients coefficients(const Part &p, const Closed &r, const Plan &, double scale) {
    return {p.unit * scale, 0, -p.unit * scale * r.M, -p.unit * scale * r.one_plus_M};
  }
};

// Where the second sweep measures from: r.ref is the row's own shift, and `rest` is what ref's rounding has
// left of it, in base 2.
template <class Real> struct RowReference {
  Reference<Real> r;
  Real rest;
};

// What the second sweep keeps of a class.
template <class F> struct Second { F q, xi; };

// Sums of the second sweep: those of a SecondPart, and, of step_kept, the terms of KL(b, m) and of KL(o, m).
template <class F> struct SecondTerms {
  F terms{}, lacks{}, excess{}, G{}, of_base{}, of_other{};
  template <class Op, class To> KD_HD void each(To &to, Op op) const {
    op(to.terms, terms);
    op(to.lacks, lacks);
    op(to.excess, excess);
    op(to.G, G);
    op(to.of_base, of_base);
    op(to.of_other, of_other);
  }
};
template <class F> struct SecondSums : SecondTerms<F> {
  IntOf<F> farthest{};  // as FirstSums has it
};

// TVD's xi: 0 where the student has more of the class than the teacher, -1 where it has less, -1/2 where they
// are equal. So M is minus what the student has of the others, a sum of one sign: where q is nearly one-hot,
// q (xi - M) is q of its class times the little that is left. gap has the sign of o - b.
template <class F> KD_HD F tvd_side(F gap, bool student_base) {
  const F zero{}, less = splat<F>(-1);
  return select(gap > zero, student_base ? less : zero,
                select(gap < zero, student_base ? zero : less, splat<F>(-.5)));
}

// q, xi and D's term of classes that only one of the two distributions has; of those that neither has, zero.
template <bool kCarry, class F, class Mix>
KD_HD void take_lone(F b, F o, F e, const Reference<RealOf<F>> &r, const Mix &mix, F &term, Second<F> &x,
                     SecondSums<F> &s) {
  using Real = RealOf<F>;
  using Int = IntOf<F>;
  constexpr Real kInf = Real(INFINITY);
  const F zero{}, own = mix.student_base ? e : zero;
  const Int no_b = b == -kInf, no_o = o == -kInf;
  const Int only_o = no_b & ~no_o, only_b = no_o & ~no_b, none = no_b & no_o;
  const F from_top = difference<kCarry>(o, splat<F>(r.top), r),
          o_weight = exp2_of_product(from_top, r.c, r.floor);
  // TVD's base_alone_term is 0
  term =
      select(none, zero,
             select(only_o, mix.other_alone_term * o_weight, select(only_b, mix.base_alone_term * e, term)));
  x.q = select(none, zero, select(only_o, mix.student_base ? zero : o_weight, select(only_b, own, x.q)));
  x.xi = select(only_o, splat<F>(mix.other_alone_xi), select(only_b, splat<F>(mix.base_alone_xi), x.xi));
  if (mix.tvd) s.lacks += select(only_b, e, zero);
  const Int within = from_top * r.c <= r.reach;
  Int lost = only_o & ~within;
  if (!(mix.other_alone_term < kInf)) lost |= only_o;  // D is +inf
  if (!(mix.base_alone_term < kInf)) lost |= only_b;
  s.farthest = lost ? Int{} + Exp2<Real>::kAbs : s.farthest;
}

// A class of the second sweep, right to the last digits of its term; eo is e e^x. kTrack: |y| may be out of
// reach, which farthest must then tell. For TVD terms sums what q has more, lacks what p has more, and excess
// the base of the former, with half of it where they are equal.
template <bool kCarry, bool kMask, bool kTrack, class F, class Mix>
KD_HD Second<F> step_by_class(F b, F o, const RowReference<RealOf<F>> &at, const Mix &mix, F e, F eo,
                              SecondSums<F> &s) {
  using Real = RealOf<F>;
  using Int = IntOf<F>;
  const bool of_student = mix.student_base;
  const F zero{};
  F y = deviation<kCarry>(b, o, at.r, at.rest), term;
  if (kMask) y = select((b == -Real(INFINITY)) | (o == -Real(INFINITY)), zero, y);
  const Int far = bits(y) & Exp2<Real>::kAbs;
  if (kTrack) s.farthest = far > s.farthest ? far : s.farthest;
  Second<F> x;
  x.q = of_student ? e : eo;
  if (mix.tvd) {
    const F em = e * expm1_psi(y).m1;
    x.xi = tvd_side(em, of_student);
    term = larger(em, zero);
    s.lacks += larger(-em, zero);
  } else {
    const MixedTerm<F> m = mixed_class(y, far, mix);
    term = e * m.term;
    x.xi = m.xi;
  }
  if (kMask) take_lone<kCarry>(b, o, e, at.r, mix, term, x, s);
  s.terms += term;
  s.G += x.q * x.xi;
  if (mix.tvd) s.excess += e + e * x.xi;
  return x;
}

// How a block that keeps e and share = e^x - 1, and has no masks, is swept the second time. With u = log(m/b)
// and w = log(o/m), in base 2:
//     kByClass   step_by_class
//     kTvdGap    TVD
//     kReverse   reverse KL, l = 0: sums of eo y
//     kBothWays  KL(o, b) and KL(b, o): sums of eo y and e y
//     kOfBase    KL(b, m) alone: sums of e psi(u), as no more than an l^2 is left of D
//     kOfOther   KL(o, m) alone: sums of eo w
//     kJoint     both, with the weights of JSD: sums of e u and eo w
// But for kTvdGap and kOfBase the sums' terms are of both signs, with rounding errors of the size of x where
// step_by_class has them of each term's, x^2: so only where that is no more than 1e-6 of D.
enum SecondWay { kByClass, kTvdGap, kReverse, kBothWays, kOfBase, kOfOther, kJoint };
KD_HD SecondWay second_way(const Mixed<double> &mix, double F) {
  constexpr double kLeast = .03;
  if (mix.tvd) return kTvdGap;
  if (F < kLeast) return kByClass;
  if (mix.l == 0) return mix.c_back > 0 ? kBothWays : kReverse;
  if (mix.c_other == 0) return kOfBase;
  if (mix.c_base == 0) return F * mix.co_l * mix.co_l > kLeast ? kOfOther : kByClass;
  return mix.share_weight == 0 && F > 4 * kLeast ? kJoint : kByClass;
}

// kLast: the row may end within the vector; there is neither b nor o then.
template <SecondWay kWay, bool kLast, class F, class Mix>
KD_HD Second<F> step_kept(F b, F o, const RowReference<RealOf<F>> &at, const Mix &mix, F e, F share,
                          SecondSums<F> &s) {
  using Real = RealOf<F>;
  const bool of_student = mix.student_base;
  const F zero{}, gap = e * share, eo = e + gap, more = share * mix.l, q = of_student ? e : eo;
  F y = deviation<false>(b, o, at.r, at.rest), xi;
  if (kLast) y = select(b == -Real(INFINITY), zero, y);
  if (kWay == kTvdGap) {
    xi = tvd_side(y, of_student);
    s.terms += larger(gap, zero);
    s.lacks += larger(-gap, zero);
    s.excess += e + e * xi;
    s.G += q * xi;
  } else if (kWay == kReverse) {
    s.of_other += eo * y;
    xi = of_student ? share * -mix.c_other : y * (mix.c_other * Real(kLn2));
  } else if (kWay == kBothWays) {
    s.of_base += e * y;
    s.of_other += eo * y;
    xi = share * -mix.c_other - y * (mix.c_back * Real(kLn2));
  } else if (kWay == kOfBase) {
    const Log1p<F> u = log1p_psi(more);
    s.of_base += e * u.psi;
    xi = of_student ? u.log * -mix.cancel_log -
                          (more * u.log - u.psi) * quotient(splat<F>(mix.cancel_psi), more + Real(1))
                    : quotient(share * mix.share_weight, more + Real(1));
    s.G += q * xi;
  } else if (kWay == kOfOther) {
    const F w = y - log2_of_1p(more), v = quotient(share * mix.co_l, more + Real(1));
    s.of_other += eo * w;
    xi = of_student ? v * -(mix.co_l * mix.c_other)
                    : w * (mix.c_other * Real(kLn2)) - v * (mix.l * mix.c_other);
    s.G += q * xi;
  } else {
    const F u = log2_of_1p(more), w = y - u;
    s.of_base += e * u;
    s.of_other += eo * w;
    xi = of_student ? u * (mix.c_base * Real(-kLn2)) : w * (mix.c_other * Real(kLn2));
  }
  return {q, xi};
}

// A block's SecondPart from what step_kept has summed. gap: sum eo - e.
KD_HD SecondPart close_kept(SecondWay way, const Mixed<double> &mix, const SecondTerms<double> &s,
                            double gap) {
  SecondPart r;
  r.terms = s.terms;
  r.lacks = s.lacks;
  r.excess = s.excess;
  r.G = s.G;
  if (way <= kTvdGap) return r;
  if (way == kOfBase) {
    r.terms = mix.c_base * s.of_base;
    return r;
  }
  const double base = mix.l * gap - s.of_base * kLn2, other = s.of_other * kLn2 - mix.co_l * gap;
  r.terms = mix.c_base * base + mix.c_other * other;
  if (way == kBothWays) {
    r.terms += mix.c_back * (gap + base);
    r.G = mix.c_back * base - mix.c_other * gap;
    return r;
  }
  if (way == kOfOther) return r;  // else M's terms are these
  if (!mix.student_base)
    r.G = mix.c_other * s.of_other * kLn2;
  else
    r.G = way == kReverse ? -mix.c_other * gap : -mix.c_base * s.of_base * kLn2;
  return r;
}

// A row after its second sweep. TVD is what one has more, or the other: of the two sums the one over less of
// the other distribution, by whose weight it is in error where x is.
template <class Crew = Alone>
KD_HD void close_second(const Part *parts, int n, const Mixed<double> &mix, Closed &r,
                        const Crew &crew = {}) {
  double sums[4]{};
  crew.sum(n, sums, [&](int i, double (&sum)[4]) {
    const Part &p = parts[i];
    if (p.empty()) return;
    sum[0] += p.unit * p.second.terms;
    sum[1] += p.unit * p.second.G;
    sum[2] += p.unit * p.second.lacks;
    sum[3] += p.unit * p.second.excess;
  });
  r.value = larger(mix.tvd && sums[3] + sums[0] > .5 ? sums[2] : sums[0], 0.);
  r.M = sums[1];
  r.one_plus_M = mix.tvd ? sums[3] + sums[0] : NAN;
  r.lost |= !std::isfinite(r.value) || !std::isfinite(r.M);
}

}  // namespace KD_LEVEL
}  // namespace kd

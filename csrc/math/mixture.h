// The mixture family: c_b KL(b, m) + c_o KL(o, m) with m = (1 - l) b + l o, seen from its base b, which is
// what m has more of: l <= 1/2. Reverse KL is l = 0 with the teacher as its base; TVD, sum b |e^x - 1| / 2,
// has the same shape, and so has the sum of both KL divergences, KL(o, b) and KL(b, o). With x = log(o / b):
//     D = sum b term(x)        T dD/dz = G - q M        G = q xi(x) of each class, M = sum G
// A term can be formed only once x is known, so the rows of this family are swept twice.
#pragma once
#include "exp.h"

namespace kd {
namespace KD_LEVEL {

// A member of the family, as its classes need it. xi is right up to a constant of the row, which M takes off.
template <class Real> struct Mixed {
  // Coefficients of term and xi near 0: their errors are 1e-7 (of xi 5e-7) or 1e-16 of them, whatever l is.
  static constexpr int kNear = sizeof(Real) == 4 ? 8 : 22;
  Real l, co_l;          // co_l = 1 - l
  Real c_base, c_other;  // the weights of KL(b, m) and KL(o, m)
  Real c_back;           // of KL(b, o), where l = 0 and the base is the student's
  Real share_weight;     // the factor of (o - b) / m in xi
  // cancels: xi is formed from psi(-u), as log m and the share (o - b) / m would cancel. With these factors:
  Real cancel_log, cancel_psi, cancel_share;
  // Term and xi of a class that only the base or only the other has, for each of its b or o.
  Real base_alone_term, other_alone_term, base_alone_xi, other_alone_xi;
  // For |y| up to this, term = y^2 sum c_j y^j and xi = y sum c_j y^j.
  Real near;
  Real near_term[kNear], near_xi[kNear];
  bool student_base, tvd, cancels;
};
template <class F> struct MixedTerm { F term, xi; };

// a / b, to a rounding; a device may have a faster one within 2^-22 (cuda/number.h).
template <class F> KD_HD F quotient(F a, F b) { return a / b; }

// A class, for l > 0 or l = 0 (reverse KL, or a weight that rounds to 0): m is e^x - 1 and psi(x). Mix: a
// Mixed<Real>, or one that knows more when it is compiled.
template <class F, class Mix> KD_HD MixedTerm<F> mixed_term(F x, const ExpM1<F> &m, const Mix &mix) {
  using Real = typename Element<F>::Real;
  const F ratio = m.m1 + Real(1);
  const auto near = (x > Real(-.5)) & (x < Real(.5));
  if (mix.l == 0) {
    if (mix.c_back != 0) {
      const F there = select(near, m.m1 * m.m1 - ratio * m.psi, ratio * x - m.m1);
      return {there * mix.c_other + m.psi * mix.c_back, -(m.m1 * mix.c_other + x * mix.c_back)};
    }
    return {mix.c_other * select(near, m.m1 * m.m1 - ratio * m.psi, ratio * x - m.m1),
            (mix.student_base ? -m.m1 : x) * mix.c_other};
  }
  const F more = m.m1 * mix.l;
  const Log1p<F> u = log1p_psi(more);
  const F w = x - u.log;  // log(o / m); log(b / m) is -u
  const F of_other =
      select(near, m.m1 * m.m1 * mix.co_l + ratio * (u.psi - m.psi), ratio * w - m.m1 * mix.co_l);
  F xi = mix.student_base ? u.log * -mix.c_base : w * mix.c_other;
  if (mix.cancels)
    xi = u.log * -mix.cancel_log -
         quotient((more * u.log - u.psi) * mix.cancel_psi + m.m1 * mix.cancel_share, more + Real(1));
  else if (mix.share_weight != 0)
    xi += quotient(m.m1 * mix.share_weight, more + Real(1));
  return {u.psi * mix.c_base + of_other * mix.c_other, xi};
}
template <class F, class Real> KD_HD MixedTerm<F> mixed_near(F y, const Mixed<Real> &mix) {
  return {y * y * polynomial(y, mix.near_term), y * polynomial(y, mix.near_xi)};
}
// Either, for y = x in base 2 and the bits of its magnitude.
template <class F, class Int, class Real>
KD_HD MixedTerm<F> mixed_class(F y, Int far, const Mixed<Real> &mix) {
  return all_within(far, mix.near) ? mixed_near(y, mix) : mixed_term(y * Real(kLn2), expm1_psi(y), mix);
}

// The coefficients c_j of x^power sum a_j x^j as y^power sum c_j y^j, with sum a_j x^j = of(x) at n Chebyshev
// nodes of |x| <= most.
template <class Real, class Of> void interpolate(int n, int power, double most, Of of, Real *c) {
  // T_k in powers of x / most and at the nodes, both by T_{k+1} = 2 x T_k - T_{k-1} from T_{-1} = x
  double now[33] = {1}, before[33] = {0, 1}, sum[32] = {}, x[32], y[32], at[32], at_before[32];
  for (int i = 0; i < n; i++) {
    x[i] = std::cos((i + .5) * 3.14159265358979323846 / n);
    y[i] = of(x[i] * most);
    at[i] = 1;
    at_before[i] = x[i];
  }
  for (int k = 0; k < n; k++) {
    double a = 0;
    for (int i = 0; i < n; i++) {
      const double next = 2 * x[i] * at[i] - at_before[i];
      a += y[i] * at[i];
      at_before[i] = at[i];
      at[i] = next;
    }
    for (int j = 0; j <= k; j++) sum[j] += a * (k ? 2 : 1) / n * now[j];
    for (int j = k + 1; j >= 0; j--) {
      const double next = (j ? 2 * now[j - 1] : 0) - before[j];
      before[j] = now[j];
      now[j] = next;
    }
  }
  for (int j = 0; j < n; j++) c[j] = Real(sum[j] * std::pow(kLn2, j + power) / std::pow(most, j));
}

// TVD, whose xi is tvd_side's.
inline Mixed<double> make_tvd() {
  Mixed<double> r{};
  r.tvd = true;
  r.other_alone_term = 1;
  r.base_alone_xi = -1;
  return r;
}

// l, c_base, c_other: as Mixed has them.
inline Mixed<double> make_mixed(bool student_base, double l, double c_base, double c_other,
                                double c_back = 0) {
  Mixed<double> r{};
  const double co_l = 1 - l, log_co_l = std::log1p(-l);
  r.student_base = student_base;
  r.l = l;
  r.co_l = co_l;
  r.c_base = c_base;
  r.c_other = c_other;
  r.c_back = c_back;
  const double less = c_base * l, more = c_other * co_l;
  // equal weights up to their rounding are JSD's, where the share drops out
  if (std::fabs(less - more) > 1e-15 * (less + more))
    r.share_weight = (student_base ? co_l : l) * (less - more);
  r.cancels = student_base && r.share_weight > 0;
  r.cancel_log = c_base * l;
  r.cancel_psi = c_base * co_l;
  r.cancel_share = c_other * co_l * co_l;
  r.base_alone_term = c_base * (-l - log_co_l) + c_other * co_l;
  r.base_alone_xi = c_other * co_l - c_base * (l + log_co_l);
  r.other_alone_term = r.other_alone_xi = c_other > 0 ? INFINITY : 0;
  if (l > 0) {
    r.other_alone_term = c_base * l + c_other * (l - 1 - std::log(l));
    r.other_alone_xi = c_base * l - c_other * (co_l + std::log(l));
  }
  if (c_back > 0) r.base_alone_term = INFINITY;
  r.near = kLog2e;
  const auto at = [&](double x) { return mixed_term<double>(x, ExpM1<double>{std::expm1(x), psi(x)}, r); };
  interpolate(r.kNear, 2, 1, [&](double x) { return at(x).term / (x * x); }, r.near_term);
  interpolate(r.kNear, 1, 1, [&](double x) { return at(x).xi / x; }, r.near_xi);
  return r;
}

// teacher KL(p, q) + student KL(q, p), seen from the student, whose weights are then e: the first is KL(o,
// b).
inline Mixed<double> make_mixed_kl(double teacher, double student) {
  return make_mixed(true, 0, 0, teacher, student);
}

inline Mixed<double> narrowed(const Mixed<double> &m, double) { return m; }
inline Mixed<float> narrowed(const Mixed<double> &m, float) {
  Mixed<float> r{};
  r.l = float(m.l);
  r.co_l = float(m.co_l);
  r.c_base = float(m.c_base);
  r.c_other = float(m.c_other);
  r.c_back = float(m.c_back);
  r.share_weight = float(m.share_weight);
  r.cancel_log = float(m.cancel_log);
  r.cancel_psi = float(m.cancel_psi);
  r.cancel_share = float(m.cancel_share);
  r.base_alone_term = float(m.base_alone_term);
  r.other_alone_term = float(m.other_alone_term);
  r.base_alone_xi = float(m.base_alone_xi);
  r.other_alone_xi = float(m.other_alone_xi);
  r.student_base = m.student_base;
  r.tvd = m.tvd;
  r.cancels = m.cancels;
  // fewer coefficients than in double, through nodes of their own: an even number of nodes leaves 0 out.
  // Where only KL(b, m) counts, whose term is nearly (e^x - 1)^2, they are right on a smaller interval
  const double most = m.c_other == 0 ? .6 : 1;
  r.near = float(most * kLog2e);
  interpolate(
      r.kNear, 2, most, [&](double x) { return polynomial(x * kLog2e, m.near_term) * (kLog2e * kLog2e); },
      r.near_term);
  interpolate(
      r.kNear, 1, most, [&](double x) { return polynomial(x * kLog2e, m.near_xi) * kLog2e; }, r.near_xi);
  return r;
}

}  // namespace KD_LEVEL
}  // namespace kd

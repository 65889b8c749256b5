// What a call asks for: the divergences by name, and a Plan, with every number that does not depend on the
// data computed once, in fp64. kdkernels/form.py is the twin of this file,
// kdkernels/terms.py that of math/.
//
// A divergence is made of the terms of math/power.h (KL is its order 1) or of math/mixture.h, seen from one
// of the two distributions, its *base* b; the other one is o, and x = log(o / b). All terms are of psi(x) =
// e^x - 1 - x and like it >= 0, so D keeps its digits however close the two are. Orders 0 and inf have no sum
// of terms, and at T = inf two moments of z - v are all there is: careful/ has them.
#pragma once
#include "divergence.h"
#include "math/mixture.h"
#include "math/power.h"

namespace kd {
namespace KD_LEVEL {

// Which struct of row/ sweeps the rows.
enum class FamilyKind : int32_t { kPlain, kTilted, kMixture };
// Which struct of careful/ takes rows in fp64.
enum class CarefulKind : int32_t { kPower, kMixture, kOrderZero, kOrderInf, kMoments, kMomentsOfOrderZero };

struct Plan {
  FamilyKind family = FamilyKind::kPlain;
  CarefulKind careful = CarefulKind::kPower;
  bool student_base = false;  // the base is the student's distribution
  bool only_careful =
      false;             // every row is taken in fp64: orders 0 and inf, T = inf, T out of the sweeps' range
  bool entropy = false;  // the cross entropy: KL, and the teacher's entropy
  bool alpha = false;    // D is F itself
  bool reverse = false;  // orders 0 and inf: p and q exchanged
  bool exact =
      false;  // T >= 64: D is so small that the rounding of 1/T shows; kExact then carries it (c_low)
  bool centered = true;  // T = inf compares z and v less their means; logit matching z and v themselves
  double order = 1, tilt = 0, factor = 1;
  Mixed<double> mixture{};
  double patience =
      64;  // a row is swept again where the terms of its value, without signs, exceed this times it
  // c = log2(e) / T rounded to the Real of the rows, c_low what that left, and k = 1 / T as c ln 2, so that a
  // row has one temperature throughout.
  double k = 0, c = 0, c_low = 0;

  // One of two things, of which the first is the student's.
  template <class T> KD_HD T base(T student, T teacher) const { return student_base ? student : teacher; }
  template <class T> KD_HD T other(T student, T teacher) const { return student_base ? teacher : student; }
  // One of two things, of which the first is the base's: exchanging is its own inverse.
  template <class T> KD_HD T student(T of_base, T of_other) const { return base(of_base, of_other); }
  template <class T> KD_HD T teacher(T of_base, T of_other) const { return other(of_base, of_other); }
};

KD_HD void plan_temperature(Plan &p, double temperature, bool wide) {
  p.exact = temperature >= 64;
  const double c = kLog2e / temperature;
  p.c = wide ? c : float(c);
  p.c_low = c - p.c;
  p.k = (p.exact ? p.c + p.c_low : p.c) * kLn2;
}

// A row of a call whose rows have temperatures of their own, as a call of one temperature; nan in all of it
// for a temperature of nan.
KD_HD kd_call at_own_temperature(const kd_call &call, int64_t row) {
  kd_call c = call;
  c.temperature = call.temperatures[row];
  c.temperatures = nullptr;
  const double square = call.squared ? c.temperature * c.temperature : c.temperature / c.temperature;
  c.value_scale *= square;
  c.grad_scale *= square / c.temperature;
  return c;
}

inline void plan_mixture(Plan &p, const kd_call &c) {
  p.family = FamilyKind::kMixture;
  p.careful = CarefulKind::kMixture;
  if (c.family == kTvd) {
    p.mixture = make_tvd();
    return;
  }
  if (c.family == kMixedKL) {
    p.student_base = true;
    p.mixture = make_mixed_kl(c.teacher_part, c.student_part);
    return;
  }
  // at 1/2 either would do, and with the student q is e itself (Form.sides takes the teacher)
  p.student_base = c.mix >= .5;
  p.mixture = p.student_base ? make_mixed(true, 1 - c.mix, c.student_part, c.teacher_part)
                             : make_mixed(false, c.mix, c.teacher_part, c.student_part);
}

inline void plan_power(Plan &p, bool wide) {
  p.family = p.order == 1 ? FamilyKind::kPlain : FamilyKind::kTilted;
  p.student_base = p.order <= .5;
  p.tilt = p.student_base ? p.order : 1 - p.order;
  if (!wide) p.tilt = float(p.tilt);
}

inline Plan make_plan(const kd_call &c, bool wide) {
  Plan p;
  p.centered = c.family != kLogitMatching;
  p.entropy = c.family == kCrossEntropy;
  p.alpha = c.family == kAlpha && c.order != 1;
  p.reverse = c.reverse;
  p.order = c.order;
  p.factor = c.factor;
  // so few classes do not average their roundings out, and are soon swept again
  if (c.vocab <= 1024) p.patience = 4;
  plan_temperature(p, c.temperature, wide);
  const bool order_zero = c.family == kSupport, order_inf = c.family == kExtreme;
  if (std::isinf(c.temperature)) {
    p.careful = order_zero ? CarefulKind::kMomentsOfOrderZero : CarefulKind::kMoments;
    p.factor = c.limit;
    p.only_careful = true;
    return p;
  }
  p.only_careful = order_zero || order_inf || c.temperature > 1e9 || c.temperature < 1e-9;
  if (c.family == kMixture || c.family == kTvd || c.family == kMixedKL)
    plan_mixture(p, c);
  else
    plan_power(p, wide);
  if (order_zero) p.careful = CarefulKind::kOrderZero;
  if (order_inf) p.careful = CarefulKind::kOrderInf;
  return p;
}

}  // namespace KD_LEVEL
}  // namespace kd

// What a call asks for: the divergences by name, and a Plan, with every number that does not depend on the
// data computed once, in fp64. kdkernels/divergence.py is the twin of this file and of math/.
//
// A divergence is a member of one of two families (math/power.h, math/mixture.h), seen from one of the two
// distributions, its *base* b; the other one is o, and x = log(o / b). All terms are of psi(x) = e^x - 1 - x
// and like it >= 0, so D keeps its digits however close the two are. Orders 0 and inf have no sum of terms,
// and at T = inf two moments of z - v are all there is: careful/ has them.
#pragma once
#include "divergence.h"
#include "math/mixture.h"
#include "math/power.h"

namespace kd {
namespace KD_LEVEL {

// What a call asks for, with every number that does not depend on the data computed once, in fp64.
struct Plan {
  bool student_base = false, tilted = false;
  bool entropy = false;             // the cross entropy: KL, and the teacher's entropy
  bool mixed = false, tvd = false;  // the mixture family, and TVD in it
  bool alpha = false;               // D is F itself
  bool moments = false;             // T = inf: moments.h
  bool centered = true;             // logit matching compares z and v themselves, not their shapes
  // every row in fp64: T = inf, orders 0 and inf, temperatures beyond the range of the tile step
  bool careful = false;
  bool support = false, extreme = false, reverse = false;
  double order = 1, tilt = 0, factor = 1;
  Mixed<double> mixture{};
  // high temperature: D is a small multiple of the squares of rounding errors' size
  bool exact = false;
  // a row is swept again where the terms of its value are, without their signs, this much larger than it
  double patience = 64;
  // 1 / T, as c ln 2, so that rows are computed at one temperature throughout
  double k = 0;
  double c = 0, c_low = 0;  // log2(e) / T, rounded to the Real of the rows, and what that left
};

inline Plan make_plan(const kd_call &c, bool wide) {
  Plan p;
  const double temperature = c.temperature;
  p.moments = std::isinf(temperature);
  p.centered = c.family != kLogitMatching;
  p.entropy = c.family == kCrossEntropy;
  p.alpha = c.family == kAlpha;
  p.support = c.family == kSupport;
  p.extreme = c.family == kExtreme;
  p.reverse = c.reverse;
  p.order = c.order;
  p.factor = c.factor;
  p.c = kLog2e / temperature;
  p.exact = temperature >= 64;
  // so few classes do not average their roundings out, and are swept again in no time
  if (c.vocab <= 1024) p.patience = 4;
  if (!wide) {
    p.c_low = p.c - float(p.c);
    p.c = float(p.c);
  }
  p.k = (p.exact ? p.c + p.c_low : p.c) * kLn2;
  if (p.moments) {
    p.factor = c.limit;
    p.careful = true;
    return p;
  }
  p.careful = p.support || p.extreme || temperature > 1e9 || temperature < 1e-9;
  p.tvd = c.family == kTvd;
  p.mixed = p.tvd || c.family == kMixture;
  if (p.mixed) {
    // at 1/2 either would do (Form.sides takes the teacher): q is e itself then
    p.student_base = !p.tvd && c.mix >= .5;
    p.mixture = p.tvd            ? make_tvd()
                : p.student_base ? make_mixed(true, 1 - c.mix, c.student_part, c.teacher_part)
                                 : make_mixed(false, c.mix, c.teacher_part, c.student_part);
    return p;
  }
  p.student_base = p.order <= .5;
  p.tilted = p.order != 1;
  p.tilt = p.student_base ? p.order : 1 - p.order;
  if (!wide) p.tilt = float(p.tilt);
  return p;
}

}  // namespace KD_LEVEL
}  // namespace kd

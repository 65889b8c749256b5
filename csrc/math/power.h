// The power family, of order a: with weights t = b e^{tilt x}, R = sum t and x = log(o / b),
//     F = sum b f(x)        f(x) = (psi(x) - psi(tilt x) / tilt) / (1 - tilt)        R = 1 - tilt (1 - tilt)
//     F KL(p, q), CE(p, q)             base p (teacher), tilt 0: f = psi              D = F, of CE plus p's
//     entropy Renyi(a), Alpha(a), a > 1/2    base p, tilt 1 - a: t = p^a q^(1-a)            D = -log(R) / (1
//     - a), or F those with          a <= 1/2   base q (student), tilt a: the same t           the same
// The smaller of the two tilts loses the fewest digits of F. T dD/dz = q - w with w = t / R (of KL w = p),
// for Alpha times R / a.
#pragma once
#include "exp.h"

namespace kd {
namespace KD_LEVEL {

// f, for the scalars of a row; tilt = 0 is KL's.
KD_HD double f_of(double x, double tilt) {
  return tilt == 0 ? psi(x) : (psi(x) - psi(tilt * x) / tilt) / (1 - tilt);
}

// log R. While R is near 1 its own logarithm has lost digits, which F, a sum of terms of one sign, still has.
KD_HD bool near_one(double R) { return R > .5 && R < 1.5; }
KD_HD double log_of_R(double F, double R, double tilt) {
  return near_one(R) ? log1p_of(-tilt * (1 - tilt) * F) : log_of(R);
}

}  // namespace KD_LEVEL
}  // namespace kd

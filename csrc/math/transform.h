// What models and recipes do to logits before a softmax (kdkernels/transforms.py): softcap tanh(scale x /
// softcap), or scale x without a softcap.
#pragma once
#include "exp.h"

namespace kd {
namespace KD_LEVEL {

template <class Real> struct Transform {
  Real scale, softcap, inner;  // inner = scale / softcap; softcap 0: none
  KD_HD Transform(double s = 1, double cap = 0)
      : scale(Real(s)), softcap(Real(cap)), inner(cap > 0 ? Real(s / cap) : 0) {}
  KD_HD bool any() const { return scale != 1 || softcap > 0; }
};

// a / b, to a rounding or two on every device: a logit of 30 would show more than quotient's error.
template <class F> KD_HD F precise_quotient(F a, F b) { return a / b; }

// What is not finite stays as it is: a masked class, a broken row.
template <class F, class Real> KD_HD F transformed(F x, const Transform<Real> &t) {
  using E = Exp2<Real>;
  if (!(t.softcap > 0)) return x * t.scale;
  const auto sign = bits(x) & ~(bits(F{}) + E::kAbs);
  const F u = from_bits(bits(x * t.inner) & E::kAbs), far = splat<F>(Real(20));  // tanh is 1 from there on
  const F m = expm1_psi(select(u < far, u, far) * Real(-2 * kLog2e)).m1,
          y = precise_quotient(m, m + Real(2)) * -t.softcap;
  const F size = from_bits(bits(x) & E::kAbs);
  return select(size < splat<F>(Real(INFINITY)), from_bits(bits(y) | sign), x);
}

// The derivative, from what the transform has given.
template <class F, class Real> KD_HD F slope(F transformed, const Transform<Real> &t) {
  if (!(t.softcap > 0)) return splat<F>(t.scale);
  // 0 for a masked class, as its g is, and for a logit of +inf, whose row no term may ask for
  const F one = splat<F>(1), size = from_bits(bits(transformed) & Exp2<Real>::kAbs);
  const F share = select(size < splat<F>(Real(INFINITY)), transformed * (1 / t.softcap), one);
  return (one - share) * (one + share) * t.scale;
}

}  // namespace KD_LEVEL
}  // namespace kd

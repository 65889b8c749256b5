// Where a block's logits are measured from, and e and y of a class from there.
#pragma once
#include "../plan.h"

namespace kd {
namespace KD_LEVEL {

// A block's references, and the temperature, in the Real of its rows.
template <class Real> struct Reference {
  Real top;           // the largest base logit
  Real ref, ref_low;  // ref + ref_low: a difference o - b near those of the block, in twice the precision
  Real c, c_low;      // c + c_low: log2(e) / T likewise
  Real tilt;          // of the power family
  Real floor;         // the smallest (b - top) whose e is not flushed to 0: kFloor / c
  Real reach;         // the largest |y| in base 2 that the exponentials take
  bool other_is_student;
};

// How a block is swept. kFast: finite logits whose differences need no more than their own precision. kExact:
// (o - b) / T without its rounding errors. kMasked: as kExact, and with -inf logits. kLost: it met
// what it has no formula for; after kFast kMasked is tried, and what is lost then is a row for careful/.
enum Care { kFast, kExact, kMasked, kLost };

// What the rounding of o - b has lost, exactly.
template <class F> KD_HD F lost_in_difference(F o, F b) {
  const F hi = o - b, back = hi - o;
  return (o - (hi - back)) - (b + back);
}

// o - b - ref. kCarry adds what the rounding of o - b has lost: it counts where a common offset is much
// larger than what remains of the difference.
template <bool kCarry, class F> KD_HD F difference(F o, F b, const Reference<RealOf<F>> &r) {
  const F hi = o - b;
  return kCarry ? (hi - r.ref) + (lost_in_difference(o, b) - r.ref_low) : hi - r.ref;
}

// (o - b - ref) / T in base 2, less `rest`, which is what the rounding of ref has left of it.
template <bool kCarry, class F> KD_HD F deviation(F b, F o, const Reference<RealOf<F>> &r, RealOf<F> rest) {
  const F t = difference<kCarry>(o, b, r);
  return kCarry ? t * r.c + (t * r.c_low - rest) : t * r.c - rest;
}

// e of a class again, with the bits that step gave it.
template <class F> KD_HD F weight_of(F b, const Reference<RealOf<F>> &r) {
  return exp2_of_product(b - r.top, r.c, r.floor);
}

}  // namespace KD_LEVEL
}  // namespace kd

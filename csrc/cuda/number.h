// A float on a GPU: a class to a thread, and the hardware's approximations in place of the mathematics' own.
#pragma once
#include "../math/number.h"
#include "verbs.h"
#define KD_NUMBERS

namespace kd {
namespace KD_LEVEL {

// 2^(a c), within 2^-22. Every term of a class has the same e as a factor, so that its error is an error of
// that class's weight. Underflow is the hardware's: the third argument, the floor, is not needed.
KD_DEVICE float exp2_of_product(float a, float c, float) { return gpu::exp2(a * c); }

// a / b within 2^-22.
KD_DEVICE float quotient(float a, float b) { return a * gpu::reciprocal(b); }

// a / b with a correction that leaves a rounding or two.
KD_DEVICE float precise_quotient(float a, float b) {
  const float r = gpu::reciprocal(b), q = a * r;
  return q + (a - q * b) * r;
}

}  // namespace KD_LEVEL
}  // namespace kd

// What the mathematics needs to know of a number: the same functions take a float, a double, or
// (cpu/vector.h) a vector of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KD_HD __host__ __device__ __forceinline__
#else
#define KD_HD inline __attribute__((always_inline))
#endif

namespace kd {
namespace KD_LEVEL {  // one namespace per instruction set: the linker must never mix their inline functions

// Which Real and which integer an F is made of.
template <class F> struct Element;
template <> struct Element<float> {
  using Real = float;
  using Int = int32_t;
};
template <> struct Element<double> {
  using Real = double;
  using Int = int64_t;
};

template <class F> using RealOf = typename Element<F>::Real;
template <class F> using IntOf = typename Element<F>::Int;

KD_HD int64_t bits(double x) {
  int64_t u;
  std::memcpy(&u, &x, 8);
  return u;
}
KD_HD int32_t bits(float x) {
  int32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
KD_HD float from_bits(int32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
KD_HD double from_bits(int64_t u) {
  double x;
  std::memcpy(&x, &u, 8);
  return x;
}
KD_HD float select(bool m, float a, float b) { return m ? a : b; }
KD_HD double select(bool m, double a, double b) { return m ? a : b; }

KD_HD float as_real(int32_t x) { return float(x); }
KD_HD double as_real(int64_t x) { return double(x); }

KD_HD bool all_within(int32_t magnitude, float most) { return from_bits(magnitude) <= most; }  // bits of |x|
KD_HD bool all_within(int64_t magnitude, double most) { return from_bits(magnitude) <= most; }

KD_HD float larger(float a, float b) { return a > b ? a : b; }  // b where a is nan
KD_HD double larger(double a, double b) { return a > b ? a : b; }

// The functions of a row's scalars. A kernel has each of them once, not inlined wherever it is called: else
// most of a kernel's code would be theirs.
#if defined(__CUDACC__)
#define KD_ONCE static __host__ __device__ __noinline__
#else
#define KD_ONCE KD_HD
#endif
KD_ONCE double exp_of(double x) { return std::exp(x); }
KD_ONCE double expm1_of(double x) { return std::expm1(x); }
KD_ONCE double log_of(double x) { return std::log(x); }
KD_ONCE double log1p_of(double x) { return std::log1p(x); }

template <class F> KD_HD F splat(typename Element<F>::Real x) { return F{} + x; }

}  // namespace KD_LEVEL
}  // namespace kd

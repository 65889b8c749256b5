// Vectors of floats, written with the compiler's generic vectors; with intrinsics where compilers make too
// many instructions of those. The mathematics is templated on F, which is a vector here and a float or double
// on a GPU: select, bits and the casts below are all that differs.
#pragma once
#include "../math/number.h"
#define KD_NUMBERS
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kd {
namespace KD_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Real> struct Vec;
template <> struct Vec<float> {
  static constexpr int W = kVectorBytes / 4;
  typedef float F __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef double D __attribute__((vector_size(2 * kVectorBytes)));
  typedef uint16_t H __attribute__((vector_size(kVectorBytes / 2)));
};
template <> struct Vec<double> {
  static constexpr int W = kVectorBytes / 8;
  typedef double F __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef F D;
};

using VF = Vec<float>::F;
using VI = Vec<float>::I;
using VH = Vec<float>::H;
using VD = Vec<double>::F;
using VL = Vec<double>::I;

template <> struct Element<VF> {
  using Real = float;
  using Int = VI;
};
template <> struct Element<VD> {
  using Real = double;
  using Int = VL;
};

KD_HD VI bits(VF x) { return (VI)x; }
KD_HD VL bits(VD x) { return (VL)x; }
KD_HD VF from_bits(VI x) { return (VF)x; }
KD_HD VD from_bits(VL x) { return (VD)x; }
KD_HD VF select(VI m, VF a, VF b) { return m ? a : b; }
KD_HD VD select(VL m, VD a, VD b) { return m ? a : b; }
KD_HD VF as_real(VI x) { return __builtin_convertvector(x, VF); }
KD_HD VD as_real(VL x) { return __builtin_convertvector(x, VD); }
KD_HD VI select(VI m, VI a, VI b) { return m ? a : b; }

// Whether no lane is set. Compilers take the lanes one by one.
template <class I> KD_HD bool none_of(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) == 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE4_1__)
  return _mm_testz_si128((__m128i)mask, (__m128i)mask);
#else
  int64_t halves[sizeof mask / 8], any = 0;
  std::memcpy(halves, &mask, sizeof mask);
  for (int64_t x : halves) any |= x;
  return any == 0;
#endif
}
KD_HD bool all_within(VI magnitude, float most) { return none_of(magnitude > bits(most)); }  // bits of |x|
KD_HD bool all_within(VL magnitude, double most) { return none_of(magnitude > bits(most)); }

// b where a is nan
template <class F> KD_HD F larger(F a, F b) { return select(a > b, a, b); }
#if defined(__AVX512F__)
// the same, where compilers make two of it
KD_HD VF larger(VF a, VF b) { return (VF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
#endif
template <class V, class T> KD_HD V load(const T *p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> KD_HD void store(T *p, V v) { std::memcpy(p, &v, sizeof v); }

// A store that does not first read the line it overwrites: a gradient is written once and read much later.
template <class V> KD_HD void stream(void *p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i *)p, (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i *)p, (__m256i)v);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i *)p, (__m128i)v);
#endif
  store((char *)p, v);
}
KD_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace KD_LEVEL
}  // namespace kd

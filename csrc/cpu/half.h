// 16-bit floats, widened and narrowed as integers or by instructions that do not depend on the thread's
// denormal mode either.
#pragma once
#include "vector.h"

namespace kd {
namespace KD_LEVEL {

typedef int16_t VS __attribute__((vector_size(kVectorBytes)));  // twice as many of them as a VH

struct bf16 { uint16_t u; };
struct f16 { uint16_t u; };

template <class S> struct Half { static constexpr bool value = false; };
template <> struct Half<bf16> { static constexpr bool value = true; };
template <> struct Half<f16> { static constexpr bool value = true; };

KD_HD VF widen(VH h, bf16) {
#if defined(__AVX512F__)
  // compilers convert a vector in halves
  return (VF)((VI)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#else
  return (VF)(__builtin_convertvector(h, VI) << 16);
#endif
}
KD_HD VF widen(VH h, f16) {
#if defined(__AVX512F__)
  return (VF)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__AVX2__) && defined(__F16C__)
  return (VF)_mm256_cvtph_ps((__m128i)h);
#else
  const VI u = __builtin_convertvector(h, VI), magnitude = u & 0x7fff, sign = (u & 0x8000) << 16;
  const VI normal = (magnitude << 13) + ((127 - 15) << 23), special = (magnitude << 13) | 0x7f800000;
  // units of 2^-24
  const VI subnormal = (VI)(__builtin_convertvector(magnitude, VF) * 5.9604644775390625e-8f);
  return (VF)(select(magnitude >= 0x7c00, special, select(magnitude < 0x0400, subnormal, normal)) | sign);
#endif
}

KD_HD VH narrow(VF x, bf16) {  // to nearest, ties to even; a nan of arithmetic (0x7fc00000) stays one
  const VI u = (VI)x;
  return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, VH);
}
KD_HD VH narrow(VF x, f16) {
#if defined(__AVX512F__)
  return (VH)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
  return (VH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VI u = (VI)x & 0x7fffffff, sign = ((VI)x >> 16) & 0x8000;
  const VI normal = (u - ((127 - 15) << 23) + 0x0fff + ((u >> 13) & 1)) >> 13;
  // .5 has ulp 2^-24
  const VI subnormal = (VI)((VF)u + .5f) - 0x3f000000;
  VI h = select(u < 0x38800000, subnormal, normal);
  h = select(u >= 0x477ff000, VI{} + 0x7c00, h);
  return __builtin_convertvector(select(u > 0x7f800000, VI{} + 0x7e00, h) | sign, VH);
#endif
}

}  // namespace KD_LEVEL
}  // namespace kd

// Vectors of floats and their 16-bit forms, written with the compiler's generic vectors; intrinsics where
// compilers make more of these than they are. The mathematics is templated on F, a vector here and a plain
// float or double on a GPU; select, bits and the casts below are all it needs to be told about the
// difference.
#pragma once
#include "number.h"
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

// ---- 16-bit floats, as integers or by instructions that do not depend on the denormal mode of the thread
// either
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

// ---- rows of any dtype to rows of Real, and back
struct DtypeCode {
  enum : int32_t { kBF16, kF16, kF32, kF64 };
};

template <class E> inline void widen_row(const E *p, int64_t n, float *out) {
  constexpr int W = Vec<float>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, widen(load<VH>(p + i), E{}));
  if (i == n) return;
  VH h{};
  std::memcpy(&h, p + i, 2 * (n - i));
  const VF x = widen(h, E{});
  std::memcpy(out + i, &x, 4 * (n - i));
}

inline void load_row(const void *p, int32_t dtype, int64_t i, int64_t n, float *out) {
  if (dtype == DtypeCode::kBF16)
    widen_row((const bf16 *)p + i, n, out);
  else if (dtype == DtypeCode::kF16)
    widen_row((const f16 *)p + i, n, out);
  else
    std::memcpy(out, (const float *)p + i, 4 * n);
}

// vectors of Real straight from a row of S: bf16, f16, or Real itself
template <class F, class S> KD_HD F load_as(const S *p) {
  if constexpr (Half<S>::value)
    return widen(load<VH>(p), S{});
  else
    return load<F>(p);
}
inline void copy_row(const bf16 *p, int64_t n, float *out) { widen_row(p, n, out); }
inline void copy_row(const f16 *p, int64_t n, float *out) { widen_row(p, n, out); }
inline void copy_row(const float *p, int64_t n, float *out) { std::memcpy(out, p, 4 * n); }
inline void copy_row(const double *p, int64_t n, double *out) { std::memcpy(out, p, 8 * n); }

// The largest of n/step whole vectors' worth of 16-bit floats, compared as the integers that order like them;
// -inf without any. A nan may win or lose.
inline float largest_half(const uint16_t *p, int64_t n, float (*value)(uint16_t), uint16_t least) {
  constexpr int W = sizeof(VS) / 2;
  const auto key = [](VS x) { return x ^ ((x >> 15) & 0x7fff); };
  VS low{};
  low += int16_t(least);
  VS a = key(low), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const VS x = key(load<VS>(p + i)), y = key(load<VS>(p + i + W));
    a = x > a ? x : a;
    b = y > b ? y : b;
  }
  a = key(a > b ? a : b);
  float top = value(least);
  for (int j = 0; j < W; j++) top = larger(value(uint16_t(a[j])), top);
  for (; i < n; i++) top = larger(value(p[i]), top);
  return top;
}
template <class E> float half_value(uint16_t u) {
  const E e{u};
  float x;
  widen_row(&e, 1, &x);
  return x;
}

constexpr int64_t kChunk = 512;  // doubles pass through floats in pieces of this many

inline void load_row(const void *p, int32_t dtype, int64_t i, int64_t n, double *out) {
  if (dtype == DtypeCode::kF64) {
    std::memcpy(out, (const double *)p + i, 8 * n);
    return;
  }
  float chunk[kChunk];
  for (int64_t j = 0; j < n; j += kChunk) {
    const int64_t m = n - j < kChunk ? n - j : kChunk;
    load_row(p, dtype, i + j, m, chunk);
    for (int64_t l = 0; l < m; l++) out[j + l] = chunk[l];
  }
}

// What is written: V vectors of kBytes each, computed by value(i) for i = 0, step, 2 step, ...; the row need
// not be aligned.
template <class V, class Value>
inline void write_row(char *out, int64_t n, int step, bool streaming, Value value) {
  const int64_t size = sizeof(V) / step;
  int64_t i = 0;
  if (streaming) {
    int64_t head = (sizeof(V) - (uintptr_t)out % sizeof(V)) % sizeof(V) / size;
    if (head > n) head = n;
    if (head) {
      const V v = value(0);
      std::memcpy(out, &v, head * size);
    }
    for (i = head; i + step <= n; i += step) stream(out + i * size, value(i));
  } else {
    for (; i + step <= n; i += step) store(out + i * size, value(i));
  }
  if (i < n) {
    const V v = value(i);
    std::memcpy(out + i * size, &v, (n - i) * size);
  }
}

// value(i) gives the vector of Real that starts at class i; it may be asked for up to one vector past n.
template <class Value>
inline void store_row(void *p, int32_t dtype, int64_t i, int64_t n, bool streaming, float, Value value) {
  constexpr int W = Vec<float>::W;
  if (dtype == DtypeCode::kBF16)
    write_row<VH>((char *)p + 2 * i, n, W, streaming, [&](int64_t j) { return narrow(value(j), bf16{}); });
  else if (dtype == DtypeCode::kF16)
    write_row<VH>((char *)p + 2 * i, n, W, streaming, [&](int64_t j) { return narrow(value(j), f16{}); });
  else
    write_row<VF>((char *)p + 4 * i, n, W, streaming, value);
}
template <class Value>
inline void store_row(void *p, int32_t dtype, int64_t i, int64_t n, bool streaming, double, Value value) {
  constexpr int W = Vec<double>::W;
  if (dtype == DtypeCode::kF64) {
    write_row<VD>((char *)p + 8 * i, n, W, streaming, value);
    return;
  }
  float chunk[kChunk + 16];
  for (int64_t j = 0; j < n; j += kChunk) {
    const int64_t m = n - j < kChunk ? n - j : kChunk;
    for (int64_t l = 0; l < m; l += W) {
      const VD x = value(j + l);
      for (int w = 0; w < W; w++) chunk[l + w] = float(x[w]);
    }
    store_row(p, dtype, i + j, m, false, 0.f, [&](int64_t l) { return load<VF>(chunk + l); });
  }
}

inline int64_t element_size(int32_t dtype) {
  return dtype == DtypeCode::kF64 ? 8 : dtype == DtypeCode::kF32 ? 4 : 2;
}

}  // namespace KD_LEVEL
}  // namespace kd

// Rows of any dtype to rows of Real, and back.
#pragma once
#include "half.h"

namespace kd {
namespace KD_LEVEL {

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

// Writes n classes to out, in vectors V of `step` classes that value(i) gives for i = 0, step, 2 step, ...;
// out need not be aligned. streaming: past the caches, with the first vector written in part so that the
// others are aligned.
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

// Writes classes [i, i + n) of a row. value(j) gives the vector of Real that starts at class i + j, and is
// called for up to one vector past n.
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

// Logits of any dtype on their way to shared memory and registers, and gradients on their way back.
#pragma once
#include "job.h"

namespace kd {
namespace KD_LEVEL {

template <int kBytes> KD_DEVICE float element(const char *p, int64_t i, bool f16) {
  if constexpr (kBytes == 4) return ((const float *)p)[i];
  const uint32_t u = ((const uint16_t *)p)[i];
  return f16 ? gpu::from_f16(u) : gpu::from_bf16(u);
}
KD_DEVICE float element(const char *p, int64_t i, int32_t dtype) {
  return dtype == KD_F32 ? element<4>(p, i, false) : element<2>(p, i, dtype == KD_F16);
}

// A chunk of a row to its place in shared memory; visible to this thread after copy_wait, to others after a
// barrier besides.
template <int kBytes> KD_DEVICE void fetch(char *to, const char *row, int first, int vocab) {
  const char *from = row + int64_t(first) * kBytes;
  if (first >= 0 && first + kRun <= vocab && (uintptr_t)from % 16 == 0) {
    KD_UNROLL for (int i = 0; i < kRun * kBytes; i += 16) gpu::copy_async(to + i, from + i);
    return;
  }
  // edges, and rows that lie otherwise than the chunks: class by class
  KD_UNROLL for (int i = 0; i < kRun; i++) {
    if (first + i < 0 || first + i >= vocab) continue;
    if (kBytes == 4)
      ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
    else
      ((uint16_t *)to)[i] = ((const uint16_t *)from)[i];
  }
}

template <int kBytes> KD_DEVICE void unpack(const char *p, bool f16, float (&x)[kRun]) {
  if constexpr (kBytes == 4) {
    const gpu::Word4 a = gpu::load16(p), b = gpu::load16(p + 16);
    KD_UNROLL for (int i = 0; i < 4; i++) {
      x[i] = from_bits((int32_t)a.x[i]);
      x[4 + i] = from_bits((int32_t)b.x[i]);
    }
  } else {
    const gpu::Word4 w = gpu::load16(p);
    if (f16) KD_UNROLL for (int i = 0; i < 4; i++) {
        x[2 * i] = gpu::from_f16(w.x[i] & 0xffff);
        x[2 * i + 1] = gpu::from_f16(w.x[i] >> 16);
      }
    else
      KD_UNROLL for (int i = 0; i < 4; i++) {
        x[2 * i] = gpu::from_bf16(w.x[i] & 0xffff);
        x[2 * i + 1] = gpu::from_bf16(w.x[i] >> 16);
      }
  }
}

// The largest of many chunks, 16-bit logits two at a time as they lie.
template <int kBytes> struct Largest {
  float value = -INFINITY;
  uint32_t pair;
  bool f16;
  explicit KD_DEVICE Largest(bool is_f16) : pair(is_f16 ? 0xfc00fc00 : 0xff80ff80), f16(is_f16) {}
  KD_DEVICE void add(const char *p) {
    if constexpr (kBytes == 4) {
      float x[kRun];
      unpack<4>(p, false, x);
      KD_UNROLL for (int i = 0; i < kRun; i++) value = gpu::largest(value, x[i]);
    } else {
      const gpu::Word4 w = gpu::load16(p);
      if (f16)
        KD_UNROLL for (int i = 0; i < 4; i++) pair = gpu::largest_f16_pair(pair, w.x[i]);
      else
        KD_UNROLL for (int i = 0; i < 4; i++) pair = gpu::largest_bf16_pair(pair, w.x[i]);
    }
  }
  KD_DEVICE float get() const {
    if (kBytes == 4) return value;
    const float a = f16 ? gpu::from_f16(pair & 0xffff) : gpu::from_bf16(pair & 0xffff),
                b = f16 ? gpu::from_f16(pair >> 16) : gpu::from_bf16(pair >> 16);
    return gpu::largest(value, gpu::largest(a, b));
  }
};

KD_DEVICE gpu::Word4 pack(int32_t dtype, const float (&g)[kRun]) {
  gpu::Word4 w;
  if (dtype == KD_F16)
    KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = gpu::to_f16_pair(g[2 * i], g[2 * i + 1]);
  else
    KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = gpu::to_bf16_pair(g[2 * i], g[2 * i + 1]);
  return w;
}
// 8 classes of a gradient, on 16 bytes.
KD_DEVICE void put_whole(char *to, int32_t dtype, const float (&g)[kRun]) {
  if (dtype != KD_F32) return gpu::store_streaming(to, pack(dtype, g));
  KD_UNROLL for (int h = 0; h < 2; h++) {
    gpu::Word4 w;
    KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = (uint32_t)bits(g[4 * h + i]);
    gpu::store_streaming(to + 16 * h, w);
  }
}
// Wherever they lie; those outside of the row are not written.
template <class Index>
KD_DEVICE void put(char *row, Index first, Index vocab, int32_t dtype, const float (&g)[kRun]) {
  char *to = row + int64_t(first) * size_of(dtype);
  if (first >= 0 && first + kRun <= vocab && (uintptr_t)to % 16 == 0) return put_whole(to, dtype, g);
  const gpu::Word4 w = pack(dtype, g);
  KD_UNROLL for (int i = 0; i < kRun; i++) {
    if (first + i < 0 || first + i >= vocab) continue;
    if (dtype == KD_F32)
      ((float *)to)[i] = g[i];
    else
      ((uint16_t *)to)[i] = uint16_t(i % 2 ? w.x[i / 2] >> 16 : w.x[i / 2] & 0xffff);
  }
}

KD_DEVICE void put_one(char *row, int64_t i, int32_t dtype, float g) {
  if (dtype == KD_F32)
    ((float *)row)[i] = g;
  else
    ((uint16_t *)row)[i] = uint16_t(dtype == KD_F16 ? gpu::to_f16_pair(g, 0) : gpu::to_bf16_pair(g, 0));
}

// Zeros over [from, to) of the gradients' rows, by teams of `threads` threads; to < 0: to their ends.
KD_DEVICE void put_zeros(const Job &job, const RowAt &at, int64_t from, int64_t to, int threads) {
  const int thread = int(unsigned(gpu::from_here(int64_t(gpu::thread()))) % threads);
  const kd_call &c = job.call;
  if (!c.grad) return;
  for (int64_t i = from + thread; i < (to < 0 ? c.grad_width : to); i += threads)
    if (c.student_dtype == KD_F32)
      ((float *)at.grad)[i] = 0;
    else
      ((uint16_t *)at.grad)[i] = 0;
}

}  // namespace KD_LEVEL
}  // namespace kd

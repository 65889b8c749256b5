// log softmax(x / T) over rows, and its gradient.
#pragma once
#include "block.h"

namespace kd {
namespace KD_LEVEL {

struct SoftmaxJob {
  kd_log_softmax_call call;
  double k;
};

// A block to a row: the largest and the sum of the others' exponentials as they come, then the row again,
// from the second-level cache.
template <class G, int kBytes>
KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads, 1) log_softmax_rows(const KD_PARAM SoftmaxJob job) {
  const kd_log_softmax_call &c = job.call;
  const BlockCrew<G> crew{(double *)gpu::shared()};
  const bool f16 = c.dtype == KD_F16;
  const int64_t row = gpu::block();
  const char *x = (const char *)c.logits + row * c.logits_stride * kBytes,
             *u = (const char *)c.upstream + row * c.upstream_stride * kBytes;
  char *out = (char *)c.out + row * c.out_stride * kBytes;
  const float k = float(job.k), k_low = float(job.k - k);
  // (v - top) / T; at T = inf every class that is not masked has the same logit
  const auto scaled = [&](float v, float top) {
    const float a = v - top;
    return !(job.k > 0) ? (v == -INFINITY ? v : v - v) : a == -INFINITY ? a : a * k + a * k_low;
  };
  const auto each = [&](auto body) {  // 8 classes at a time where they lie on 16 bytes
    const int64_t ahead = (16 - (uintptr_t)x % 16) % 16 / kBytes, head = ahead < c.vocab ? ahead : c.vocab,
                  runs = (c.vocab - head) / kRun;
    KD_ROLLED for (int64_t i = gpu::thread(); i < head; i += G::kThreads) {
      const float v[1]{element<kBytes>(x, i, f16)};
      body(i, v);
    }
    KD_ROLLED for (int64_t r = gpu::thread(); r < runs; r += G::kThreads) {
      float v[kRun];
      unpack<kBytes>(x + (head + r * kRun) * kBytes, f16, v);
      body(head + r * kRun, v);
    }
    KD_ROLLED for (int64_t i = head + runs * kRun + gpu::thread(); i < c.vocab; i += G::kThreads) {
      const float v[1]{element<kBytes>(x, i, f16)};
      body(i, v);
    }
  };
  float top = -INFINITY;
  double others = 0, total = 0;  // sum of e^{(x - top)/T}, the largest class left out
  bool nan = false;
  each([&](int64_t i, const auto &v) {
    constexpr int n = sizeof(v) / sizeof(float);
    float most = v[0], sum = 0;
    KD_UNROLL for (int j = 0; j < n; j++) {
      most = gpu::largest(most, v[j]);
      nan |= v[j] != v[j];
    }
    if (most > top) {
      others = top > -INFINITY ? (others + 1) * gpu::exp2(scaled(top, most) * float(kLog2e)) : 0;
    }
    int ties = most > top ? -1 : 0;
    top = gpu::largest(most, top);
    KD_UNROLL for (int j = 0; j < n; j++) {
      const float e = gpu::exp2(scaled(v[j], top) * float(kLog2e));
      if (v[j] == top)
        ties++;
      else
        sum += e;
    }
    if (top > -INFINITY) others += sum + ties;
    if (c.upstream) KD_UNROLL for (int j = 0; j < n; j++) total += element<kBytes>(u, i + j, f16);
  });
  const double highest = crew.largest(top);
  const bool broken = crew.any(nan) || !(std::fabs(highest) < INFINITY);
  const double own = top > -INFINITY ? (others + 1) * exp_of(double(scaled(top, float(highest)))) : 0;
  const bool holder = top == highest;
  const double rest = crew.sum(holder ? others : own) + (crew.sum(holder) - 1);
  const float log_total = broken ? NAN : float(log1p_of(rest));
  const float inverse = c.upstream ? float(crew.sum(total) / (1 + rest)) : 0;
  const auto store = [&](int64_t i, float y) {
    if (kBytes == 4)
      ((float *)out)[i] = y;
    else
      ((uint16_t *)out)[i] = uint16_t(f16 ? gpu::to_f16_pair(y, 0) : gpu::to_bf16_pair(y, 0));
  };
  each([&](int64_t i, const auto &v) {
    constexpr int n = sizeof(v) / sizeof(float);
    float y[n];
    KD_UNROLL for (int j = 0; j < n; j++) {
      const float a = scaled(v[j], float(highest));
      y[j] = a - log_total;
      if (c.upstream)
        y[j] = (element<kBytes>(u, i + j, f16) - gpu::exp2(a * float(kLog2e)) * inverse + 0 * log_total) * k;
    }
    if constexpr (n == kRun)
      put(out, i, c.vocab, c.dtype, y);
    else
      store(i, y[0]);
  });
}

}  // namespace KD_LEVEL
}  // namespace kd

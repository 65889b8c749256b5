// log softmax(x / T) over rows, and its gradient.
#pragma once
#include "block.h"

namespace kd {
namespace KD_LEVEL {

struct SoftmaxJob {
  kd_log_softmax_call call;
  double k;
};

// Of a thread's classes: the largest logit, the sum of the others' e^{(x - top)/T}, and the sum of the
// upstream gradient.
struct SoftmaxSums {
  float top = -INFINITY;
  double others = 0, upstream = 0;
  bool nan = false;
};
// Of the row. log_total: of the sum of e^{(x - top)/T}; inverse: the sum of the upstream gradient over that
// sum.
struct SoftmaxClosed { float top, log_total, inverse; };

// A row by a block: the largest and the sum of the others' exponentials as they come, then the row again,
// from the second-level cache.
template <class G, int kBytes> struct SoftmaxRow {
  const kd_log_softmax_call &c;
  const double one_over_T;
  const float k, k_low;
  const bool f16;
  const char *const x, *const upstream;
  char *const out;

  KD_DEVICE SoftmaxRow(const SoftmaxJob &job, int64_t row)
      : c(job.call),
        one_over_T(job.k),
        k(float(job.k)),
        k_low(float(job.k - k)),
        f16(job.call.dtype == KD_F16),
        x((const char *)c.logits + row * c.logits_stride * kBytes),
        upstream((const char *)c.upstream + row * c.upstream_stride * kBytes),
        out((char *)c.out + row * c.out_stride * kBytes) {}

  // (v - top) / T; at T = inf every class that is not masked has the same logit.
  KD_DEVICE float scaled(float v, float top) const {
    const float a = v - top;
    return !(one_over_T > 0) ? (v == -INFINITY ? v : v - v) : a == -INFINITY ? a : a * k + a * k_low;
  }
  // body(i, v) for this thread's classes: 8 at a time where they lie on 16 bytes, else one.
  template <class Body> KD_DEVICE void each(Body body) const {
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
  }

  template <int n> KD_DEVICE void add(int64_t i, const float (&v)[n], SoftmaxSums &s) const {
    float most = v[0], sum = 0;
    KD_UNROLL for (int j = 0; j < n; j++) {
      most = gpu::largest(most, v[j]);
      s.nan |= v[j] != v[j];
    }
    if (most > s.top)
      s.others = s.top > -INFINITY ? (s.others + 1) * gpu::exp2(scaled(s.top, most) * float(kLog2e)) : 0;
    int ties = most > s.top ? -1 : 0;
    s.top = gpu::largest(most, s.top);
    KD_UNROLL for (int j = 0; j < n; j++) {
      const float e = gpu::exp2(scaled(v[j], s.top) * float(kLog2e));
      if (v[j] == s.top)
        ties++;
      else
        sum += e;
    }
    if (s.top > -INFINITY) s.others += sum + ties;
    if (c.upstream) KD_UNROLL for (int j = 0; j < n; j++) s.upstream += element<kBytes>(upstream, i + j, f16);
  }

  KD_DEVICE SoftmaxClosed close(const SoftmaxSums &s, const BlockCrew<G> &crew) const {
    const double highest = crew.largest(s.top);
    const bool broken = crew.any(s.nan) || !(std::fabs(highest) < INFINITY), holder = s.top == highest;
    const double own = s.top > -INFINITY ? (s.others + 1) * exp_of(double(scaled(s.top, float(highest)))) : 0;
    const double rest = crew.sum(holder ? s.others : own) + (crew.sum(holder) - 1);
    return {float(highest), broken ? NAN : float(log1p_of(rest)),
            c.upstream ? float(crew.sum(s.upstream) / (1 + rest)) : 0};
  }

  template <int n> KD_DEVICE void emit(int64_t i, const float (&v)[n], const SoftmaxClosed &r) const {
    float y[n];
    KD_UNROLL for (int j = 0; j < n; j++) {
      const float a = scaled(v[j], r.top);
      y[j] = a - r.log_total;
      if (c.upstream)
        y[j] = (element<kBytes>(upstream, i + j, f16) - gpu::exp2(a * float(kLog2e)) * r.inverse +
                0 * r.log_total) *
               k;
    }
    if constexpr (n == kRun)
      put(out, i, c.vocab, c.dtype, y);
    else
      put_one(out, i, c.dtype, y[0]);
  }
};

template <class G, int kBytes>
KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads, 1) log_softmax_rows(const KD_PARAM SoftmaxJob job) {
  const SoftmaxRow<G, kBytes> row(job, gpu::block());
  SoftmaxSums sums;
  row.each([&](int64_t i, const auto &v) { row.add(i, v, sums); });
  const SoftmaxClosed closed = row.close(sums, BlockCrew<G>{(double *)gpu::shared()});
  row.each([&](int64_t i, const auto &v) { row.emit(i, v, closed); });
}

}  // namespace KD_LEVEL
}  // namespace kd

// The kernels beside the two of the loss: rows in fp64 (careful.h), log-softmax, a gradient times its
// upstream one.
#pragma once
#include "../moments.h"
#include "tile.h"

namespace kd {
namespace KD_LEVEL {

// ---------------------------------------------------------------- rows that a float's range cannot hold
// A block to a row; sums and maxima over a block, in a fixed order.
template <class G> struct BlockCrew {
  double *room;  // [kWarps]
  template <class Op> KD_DEVICE double over_warps(double x, Op op) const {
    if ((gpu::thread() & 31) == 0) room[gpu::thread() / 32] = x;
    gpu::sync_block();
    x = room[0];
    for (int i = 1; i < G::kWarps; i++) x = op(x, room[i]);
    gpu::sync_block();
    return x;
  }
  KD_DEVICE double sum(double x) const {
    double one[1]{x};
    gpu::warp_sum(one);
    return over_warps(one[0], [](double a, double b) { return a + b; });
  }
  KD_DEVICE double largest(double x) const {
    return over_warps(gpu::warp_largest(x), [](double a, double b) { return a > b ? a : b; });
  }
  KD_DEVICE bool any(bool x) const { return gpu::sync_block_any(x); }
};

template <class G, class Row64>
KD_DEVICE void careful_row(const Job &job, int64_t row, const BlockCrew<G> &crew, Row64 &careful) {
  const kd_call &c = job.call;
  const RowAt at = look_up(job, row);
  if (at.weight == 0) {
    if (gpu::thread() == 0) put_nothing(c, row);
    put_zeros(job, at, 0, -1, G::kThreads);
    return;
  }
  const Transform<double> of_student(c.student_scale, c.student_softcap),
      of_teacher(c.teacher_scale, c.teacher_softcap);
  const auto student = [&](int64_t i) {
    return transformed(double(element(at.student, i, c.student_dtype)), of_student);
  };
  const auto teacher = [&](int64_t i) {
    return transformed(double(element(at.teacher, i, c.teacher_dtype)), of_teacher);
  };
  const auto classes = [&](auto body) {
    KD_ROLLED for (int64_t i = gpu::thread(); i < c.vocab; i += G::kThreads) body(student(i), teacher(i));
  };
  double value = careful.measure(classes);
  // a factor of 0 says that the soft term is not there, whatever it would be; the student's row breaks the
  // hard term too
  const double none = job.hard && careful.broken_student() ? NAN : 0;
  SmoothPart own;
  HardRow h;
  const auto hard_weight = [&](double z) { return exp2_flushed((z - own.top) * kLog2e); };
  if (job.hard) {
    double top = -INFINITY, rest = 0, ties = 0, below = 0, count = 0;
    KD_ROLLED for (int64_t i = gpu::thread(); i < c.vocab; i += G::kThreads) top = larger(student(i), top);
    own.top = crew.largest(top);
    if (own.top - own.top == 0) {
      KD_ROLLED for (int64_t i = gpu::thread(); i < c.vocab; i += G::kThreads) {
        const double z = student(i);
        rest += z == own.top ? 0 : hard_weight(z);
        ties += z == own.top;
        if (z > -INFINITY) {
          below += own.top - z;
          count += 1;
        }
      }
      own.rest = crew.sum(rest) + (crew.sum(ties) - 1);
      own.s = 1 + own.rest;
      own.below = crew.sum(below);
      own.count = crew.sum(count);
    }
    h = close_hard(
        c, 1, [&](int) -> const SmoothPart & { return own; }, at.label < 0 ? NAN : student(at.label));
  }
  Shapes shapes{};
  if (job.entropies) shapes = careful.shapes(classes);
  if (job.plan.entropy) value += shapes.of_v;
  if (c.stats) {
    // of this thread, whose classes ascend
    double z = -INFINITY, v = -INFINITY, first_z = INFINITY, first_v = INFINITY;
    KD_ROLLED for (int64_t i = gpu::thread(); i < c.vocab; i += G::kThreads) {
      if (student(i) > z) {
        z = student(i);
        first_z = double(i);
      }
      if (teacher(i) > v) {
        v = teacher(i);
        first_v = double(i);
      }
    }
    first_z = -crew.largest(z == crew.largest(z) ? -first_z : -INFINITY);
    first_v = -crew.largest(v == crew.largest(v) ? -first_v : -INFINITY);
    double *const out = c.stats + row * KD_STATS;
    if (gpu::thread() == 0) {
      put_values(job, out, value, h);
      put_shapes(out, shapes, first_z, first_v);
    }
  }
  gpu::sync_block();
  if (gpu::thread() == 0) c.loss[row] = loss_of(job, at.weight, value, h, none);
  if (!c.grad) return;
  const double scale = at.weight * c.grad_scale, hard_scale = at.weight * c.hard_grad_scale;
  const double label = job.hard ? hard_scale * label_gradient(c, h) : 0,
               of_q = hard_scale * (1 + h.pull) / h.s;
  const double smoothing = job.smooth ? -hard_scale * c.label_smoothing / h.count : 0;
  const bool known = at.label_logit == at.label_logit;
  KD_ROLLED for (int64_t i = gpu::thread(); i < c.vocab; i += G::kThreads) {
    const double z = student(i);
    double g = c.grad_scale != 0 ? scale * careful.gradient(z, teacher(i)) : none;
    if (job.hard) g += i == at.label ? label : own.s > 0 ? of_q * hard_weight(z) : 0;
    g = (g + (z > -INFINITY ? smoothing : 0)) * slope(z, of_student);
    const float out = known ? float(g) : NAN;
    put_one(at.grad, i, c.student_dtype, out);
  }
  put_zeros(job, at, c.vocab, -1, G::kThreads);
}

// A block looks at the losses of `look` rows, and computes those that were left.
constexpr int kLook = 16;
template <class G> KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads, 1) careful_rows(const KD_PARAM Job job) {
  const BlockCrew<G> crew{(double *)gpu::shared()};
  const int look = job.all ? 1 : kLook;
  KD_ROLLED for (int64_t i = 0; i < look; i++) {
    const int64_t row = gpu::block() * look + i;
    if (row >= job.call.rows) return;
    const bool mine = job.all || bits(job.call.loss[row]) == kLostMark;
    gpu::sync_block();  // everyone has read the loss before anyone writes it
    if (mine)
      with_careful<double>(job.plan, crew, [&](auto &careful) { careful_row(job, row, crew, careful); });
  }
}

// ---------------------------------------------------------------- log-softmax
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

// ---------------------------------------------------------------- x *= factor
// The factor is read on the device; nothing is moved where it is 1.
struct ScaleJob {
  void *x;
  const void *factor;
  int64_t count;
  int32_t dtype, factor_dtype;
};

template <class G> KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads, 1) scale_all(const KD_PARAM ScaleJob job) {
  const double exact = job.factor_dtype == KD_F64 ? *(const double *)job.factor
                                                  : element((const char *)job.factor, 0, job.factor_dtype);
  const float factor = float(exact);
  if (factor == 1) return;
  const int64_t runs = (job.count + kRun - 1) / kRun, stride = gpu::blocks() * G::kThreads;
  for (int64_t r = gpu::block() * G::kThreads + gpu::thread(); r < runs; r += stride) {
    const int64_t i = r * kRun;
    char *x = (char *)job.x;
    float y[kRun];
    if (i + kRun <= job.count && (uintptr_t)x % 16 == 0) {
      if (job.dtype == KD_F32)
        unpack<4>(x + i * 4, false, y);
      else
        unpack<2>(x + i * 2, job.dtype == KD_F16, y);
    } else {
      for (int j = 0; j < kRun; j++) y[j] = i + j < job.count ? element(x, i + j, job.dtype) : 0;
    }
    KD_UNROLL for (int j = 0; j < kRun; j++) y[j] *= factor;
    put(x, i, job.count, job.dtype, y);
  }
}

}  // namespace KD_LEVEL
}  // namespace kd

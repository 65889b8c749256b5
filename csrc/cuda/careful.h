// The rows that a float's range cannot hold, in fp64 (careful/): a block to a row.
#pragma once
#include "../careful/careful.h"
#include "block.h"
#include "close.h"

namespace kd {
namespace KD_LEVEL {

// The logits of a row as doubles.
class WideRow {
 public:
  KD_DEVICE WideRow(const kd_call &c, const RowAt &at)
      : c_(c),
        at_(at),
        of_student(c.student_scale, c.student_softcap),
        of_teacher_(c.teacher_scale, c.teacher_softcap) {}
  KD_DEVICE double student(int64_t i) const {
    return transformed(double(element(at_.student, i, c_.student_dtype)), of_student);
  }
  KD_DEVICE double teacher(int64_t i) const {
    return transformed(double(element(at_.teacher, i, c_.teacher_dtype)), of_teacher_);
  }
  // body(i) for this thread's classes, which ascend.
  template <class G, class Body> KD_DEVICE void each(Body body) const {
    KD_ROLLED for (int64_t i = gpu::thread(); i < c_.vocab; i += G::kThreads) body(i);
  }

 private:
  const kd_call &c_;
  const RowAt &at_;

 public:
  const Transform<double> of_student;

 private:
  const Transform<double> of_teacher_;
};

KD_DEVICE double hard_weight(double z, double top) { return exp2_flushed((z - top) * kLog2e); }

template <class G> KD_DEVICE SmoothPart careful_hard(const WideRow &x, const BlockCrew<G> &crew) {
  SmoothPart own;
  double top = -INFINITY, rest = 0, ties = 0, below = 0, count = 0;
  x.each<G>([&](int64_t i) { top = larger(x.student(i), top); });
  own.top = crew.largest(top);
  if (own.top - own.top != 0) return own;
  x.each<G>([&](int64_t i) {
    const double z = x.student(i);
    rest += z == own.top ? 0 : hard_weight(z, own.top);
    ties += z == own.top;
    if (z > -INFINITY) {
      below += own.top - z;
      count += 1;
    }
  });
  own.rest = crew.sum(rest) + (crew.sum(ties) - 1);
  own.s = 1 + own.rest;
  own.below = crew.sum(below);
  own.count = crew.sum(count);
  return own;
}

// The first classes with the largest logits to a row's statistics, besides its entropies.
template <class G>
KD_DEVICE void careful_statistics(const WideRow &x, const BlockCrew<G> &crew, const Entropies &found,
                                  double *out) {
  double z = -INFINITY, v = -INFINITY, first_z = INFINITY, first_v = INFINITY;
  x.each<G>([&](int64_t i) {
    if (x.student(i) > z) {
      z = x.student(i);
      first_z = double(i);
    }
    if (x.teacher(i) > v) {
      v = x.teacher(i);
      first_v = double(i);
    }
  });
  first_z = -crew.largest(z == crew.largest(z) ? -first_z : -INFINITY);
  first_v = -crew.largest(v == crew.largest(v) ? -first_v : -INFINITY);
  if (gpu::thread() == 0) put_entropies(out, found, first_z, first_v);
}

// none: the soft term where it has no weight.
template <class G, class Row64>
KD_DEVICE void careful_gradient(const Job &job, const RowAt &at, const WideRow &x, const Row64 &careful,
                                const HardRow &h, double none) {
  const kd_call &c = job.call;
  const double scale = at.weight * c.grad_scale, hard_scale = at.weight * c.hard_grad_scale;
  const double label = job.hard ? hard_scale * label_gradient(c, h) : 0,
               of_q = hard_scale * (1 + h.pull) / h.s;
  const double smoothing = job.smooth ? -hard_scale * c.label_smoothing / h.count : 0;
  const bool known = at.label_logit == at.label_logit;
  x.each<G>([&](int64_t i) {
    const double z = x.student(i);
    double g = c.grad_scale != 0 ? scale * careful.gradient(z, x.teacher(i)) : none;
    if (job.hard) g += i == at.label ? label : h.s > 0 ? of_q * hard_weight(z, h.top) : 0;
    g = (g + (z > -INFINITY ? smoothing : 0)) * slope(z, x.of_student);
    const float out = known ? float(g) : NAN;
    put_one(at.grad, i, c.student_dtype, out);
  });
  put_zeros(job, at, c.vocab, -1, G::kThreads);
}

template <class G, class Row64>
KD_DEVICE void careful_row(const Job &job, int64_t row, const BlockCrew<G> &crew, Row64 &careful) {
  const kd_call &c = job.call;
  const RowAt at = look_up(job, row);
  if (at.weight == 0) {
    if (gpu::thread() == 0) put_nothing(c, row);
    put_zeros(job, at, 0, -1, G::kThreads);
    return;
  }
  const WideRow x(c, at);
  const auto classes = [&](auto body) { x.each<G>([&](int64_t i) { body(x.student(i), x.teacher(i)); }); };
  double value = careful.measure(classes);
  // a factor of 0 says that the soft term is not there, whatever it would be; the student's row breaks the
  // hard term too
  const double none = job.hard && careful.broken_student() ? NAN : 0;
  SmoothPart own;
  HardRow h;
  if (job.hard) {
    own = careful_hard(x, crew);
    h = close_hard(
        c, 1, [&](int) -> const SmoothPart & { return own; }, at.label < 0 ? NAN : x.student(at.label));
  }
  Entropies found{};
  if (job.entropies) found = careful.entropies(classes);
  if (job.plan.entropy) value += found.of_v;
  if (c.stats) {
    double *const out = c.stats + row * KD_STATS;
    if (gpu::thread() == 0) put_values(job, out, value, h);
    careful_statistics(x, crew, found, out);
  }
  gpu::sync_block();
  if (gpu::thread() == 0) c.loss[row] = loss_of(job, at.weight, value, h, none);
  if (c.grad) careful_gradient<G>(job, at, x, careful, h, none);
}

// A block looks at the losses of `look` rows, and computes those that were left.
constexpr int kLook = 16;
template <class G> struct CarefulMemory {
  double crew[G::kWarps];
  Job own;  // of a row with a temperature of its own
};
// kOwn: rows have temperatures of their own. A kernel apart, as a job in shared memory takes registers with
// which one block less fits a multiprocessor.
template <class G, bool kOwn>
KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads, 1) careful_rows(const KD_PARAM Job job) {
  CarefulMemory<G> &memory = *(CarefulMemory<G> *)gpu::shared();
  const BlockCrew<G> crew{memory.crew};
  const Job &used = kOwn ? memory.own : job;
  const int look = job.all ? 1 : kLook;
  KD_ROLLED for (int64_t i = 0; i < look; i++) {
    const int64_t row = gpu::block() * look + i;
    if (row >= job.call.rows) return;
    const bool mine = job.all || bits(job.call.loss[row]) == kLostMark;
    gpu::sync_block();  // everyone has read the loss before anyone writes it
    if constexpr (kOwn) {
      if (gpu::thread() == 0) {
        memory.own = job;
        memory.own.call = at_own_temperature(job.call, row);
        plan_temperature(memory.own.plan, memory.own.call.temperature, true);
      }
      gpu::sync_block();
    }
    if (mine)
      with_careful<double>(used.plan, crew, [&](auto &careful) { careful_row(used, row, crew, careful); });
  }
}

}  // namespace KD_LEVEL
}  // namespace kd

// Where the rows of a call lie, what a thread works with, and what is known of the row under way.
#pragma once
#include "kept.h"
#include "hard.h"
#include "../math/transform.h"

namespace kd {
namespace KD_LEVEL {
namespace {

KD_HD const char *row_at(const void *p, int32_t dtype, const int64_t *stride, const kd_call &c, int64_t row) {
  return (const char *)p + (row / c.inner * stride[0] + row % c.inner * stride[1]) * element_size(dtype);
}

// What one thread works with: room for a block, and its share of the workspace.
template <class Real> struct Room {
  alignas(64) Real base[kSlot<Real>], other[kSlot<Real>], slot[kMostArrays * kSlot<Real>], g[kSlot<Real>];
  Real *workspace = nullptr;
  int64_t capacity = 0;  // blocks that fit the workspace
};

// A row under way.
struct RowState {
  // of each block; stats is null where no entropies are asked for
  Part *parts;
  SmoothPart *hards;
  StatPart *stats;
  int64_t number = 0;  // of the row
  double weight = 1;
  Closed closed;
  HardRow hard;
};

// What is asked of every block's gradient: scales, and whether it goes past the caches.
struct Emission {
  double soft, hard;  // factors of the soft and the hard term's gradient
  bool streaming;
};

// S: R, or what widens to it.
template <class S, class R> void transform_row(const S *x, int64_t n, const Transform<R> &t, R *out) {
  using F = typename Vec<R>::F;
  constexpr int W = Vec<R>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    __builtin_prefetch(x + i + kBlock<R>);  // the next block
    store(out + i, transformed(load_as<F>(x + i), t));
  }
  R rest[W] = {};
  copy_row(x + i, n - i, rest);
  store(rest, transformed(load<F>(rest), t));
  std::memcpy(out + i, rest, (n - i) * sizeof(R));
}

// Classes of a row as Reals: where they lie, or in the buffer.
template <class Real>
const Real *fetch(const char *row, int32_t dtype, const Transform<Real> &t, int64_t i, int64_t n,
                  Real *buffer) {
  if (element_size(dtype) == sizeof(Real) && !t.any()) return (const Real *)row + i;
  if (!t.any())
    load_row(row, dtype, i, n, buffer);
  else if (element_size(dtype) == sizeof(Real))
    transform_row((const Real *)row + i, n, t, buffer);
  else if constexpr (sizeof(Real) == 8) {
    load_row(row, dtype, i, n, buffer);
    transform_row((const Real *)buffer, n, t, buffer);
  } else if (dtype == KD_BF16)
    transform_row((const bf16 *)row + i, n, t, buffer);
  else
    transform_row((const f16 *)row + i, n, t, buffer);
  return buffer;
}

// The rows of a call, as blocks.
template <class Real> struct Rows {
  const kd_call &c;
  const Plan &plan;
  const Transform<Real> of_student, of_teacher;
  const int64_t blocks;
  const bool hard, smooth, entropies;
  const bool by_class;  // each class of the gradient has a factor or a summand of its own

  Rows(const kd_call &call, const Plan &p)
      : c(call),
        plan(p),
        of_student(call.student_scale, call.student_softcap),
        of_teacher(call.teacher_scale, call.teacher_softcap),
        blocks((call.vocab + kBlock<Real> - 1) / kBlock<Real>),
        hard(has_hard(call)),
        smooth(hard && call.label_smoothing != 0),
        entropies(call.stats || p.entropy),
        by_class(of_student.softcap > 0 || smooth) {}

  const char *student(int64_t row) const {
    return row_at(c.student, c.student_dtype, c.student_stride, c, row);
  }
  const char *teacher(int64_t row) const {
    return row_at(c.teacher, c.teacher_dtype, c.teacher_stride, c, row);
  }
  char *grad(int64_t row) const { return (char *)row_at(c.grad, c.grad_dtype, c.grad_stride, c, row); }
  int64_t first_class(int64_t block) const { return block * kBlock<Real>; }
  int64_t length(int64_t block) const { return smaller(kBlock<Real>, c.vocab - first_class(block)); }

  // body(z, logits): a block where it lies if both rows are stored alike, else as Reals in the room; z are
  // the student's logits.
  template <class Body> void with_block(int64_t row, int64_t block, Room<Real> &room, Body body) const {
    const int64_t i = first_class(block), n = length(block);
    const char *z = student(row), *v = teacher(row);
    const auto with = [&](auto *z, auto *v) {
      body(z, Logits<std::remove_const_t<std::remove_pointer_t<decltype(z)>>>{plan.base(z, v),
                                                                              plan.other(z, v), n});
    };
    if constexpr (sizeof(Real) == 4)
      if (c.student_dtype == c.teacher_dtype && !of_student.any() && !of_teacher.any()) {
        if (c.student_dtype == KD_BF16) return with((const bf16 *)z + i, (const bf16 *)v + i);
        if (c.student_dtype == KD_F16) return with((const f16 *)z + i, (const f16 *)v + i);
      }
    Real *const base = room.base, *const other = room.other;
    with(fetch(z, c.student_dtype, of_student, i, n, plan.student(base, other)),
         fetch(v, c.teacher_dtype, of_teacher, i, n, plan.teacher(base, other)));
  }

  template <class S> SmoothPart hard_block(const S *z, int64_t n, Real *weights) const {
    return smooth ? sweep_hard<true>(z, n, weights) : sweep_hard<false>(z, n, weights);
  }
  Real label_logit(int64_t row) const {
    Real label;
    return *fetch(student(row), c.student_dtype, of_student, c.labels[row], 1, &label);
  }

  // The scales of a row's gradient. Where nothing is done class by class, the student's scale is one of them.
  Emission emission(const RowState &s, bool streaming) const {
    const double unit = by_class ? 1 : c.student_scale;
    return {s.weight * (c.grad_scale * unit), s.weight * (c.hard_grad_scale * unit), streaming};
  }

  // False: the row counts for nothing, and is done.
  bool begin(RowState &s, int64_t row) const {
    s.number = row;
    s.closed = Closed();
    s.weight = c.weight ? c.weight[row] : 1;
    if (s.weight != 0) return true;
    c.loss[row] = 0;
    if (c.grad) std::memset(grad(row), 0, c.grad_width * element_size(c.grad_dtype));
    if (c.stats)
      for (int i = 0; i < KD_STATS; i++) c.stats[row * KD_STATS + i] = NAN;
    return false;
  }
};

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

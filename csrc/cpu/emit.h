// The gradient of a block, from what it has kept to the caller's memory.
#pragma once
#include "rows.h"

namespace kd {
namespace KD_LEVEL {
namespace {

// Classes [i, i + n) of a row of a gradient.
struct Target {
  void *row;
  int32_t dtype;
  int64_t i, n;
  bool streaming;
};

// A block's share of the hard term's gradient: factor times its weights; without one weights is null.
template <class Real> struct HardGradient {
  const Real *weights;
  double factor;
};

template <class Real, class Gradient>
void emit(const Gradient &gradient, const HardGradient<Real> &hard, const Target &to) {
  using F = typename Vec<Real>::F;
  const auto with = [&](auto value) {
    store_row(to.row, to.dtype, to.i, to.n, to.streaming, Real(0), value);
  };
  if (!hard.weights)
    return with([=](int64_t l) __attribute__((always_inline)) { return gradient.template at<F>(l); });
  const Real *const weights = hard.weights, factor = Real(hard.factor);
  with([=](int64_t l) __attribute__((always_inline)) {
    F g = gradient.template at<F>(l);
    g += load<F>(weights + l) * factor;
    return g;
  });
}

// room.g, and what each class of it has besides: label smoothing's summand, the transform's slope.
template <class Real>
void put_by_class(const Rows<Real> &rows, int64_t row, double smoothing, const Target &to, Room<Real> &room) {
  using F = typename Vec<Real>::F;
  const kd_call &c = rows.c;
  const Transform<Real> t = rows.of_student;
  const Real more = Real(smoothing);
  const Real *const z = room.base;  // a copy: the row may end where the last vector does not
  if (t.any())
    fetch(rows.student(row), c.student_dtype, t, to.i, to.n, room.base);
  else
    load_row(rows.student(row), c.student_dtype, to.i, to.n, room.base);
  store_row(to.row, to.dtype, to.i, to.n, to.streaming, Real(0),
            [=, &room](int64_t j) __attribute__((always_inline)) {
              const F at = load<F>(z + j), own = select(at > Real(-INFINITY), splat<F>(more), F{});
              return F((load<F>(room.g + j) + own) * slope(at, t));
            });
}

template <class Real>
HardGradient<Real> hard_gradient(const Rows<Real> &rows, const RowState &s, int64_t block, double scale,
                                 const Real *weights) {
  if (!rows.hard) return {nullptr, 0};
  const HardPart &part = s.hards[block];
  if (!(part.s > 0)) return {weights, 0};
  return {weights, scale * (1 + s.hard.pull) * std::exp(part.top - s.hard.top) / s.hard.s};
}

// weights: the hard term's, of the block.
template <class Real, class Gradient>
void put_block(const Rows<Real> &rows, const RowState &s, int64_t block, const Gradient &gradient,
               const Real *weights, const Emission &how, Room<Real> &room) {
  const kd_call &c = rows.c;
  const int64_t i0 = rows.first_class(block), n = rows.length(block);
  int64_t label = rows.hard ? c.labels[s.number] - i0 : -1;
  if (label < 0 || label >= n) label = -1;
  const HardGradient<Real> hard = hard_gradient(rows, s, block, how.hard, weights);
  char *const out = rows.grad(s.number);
  const Target here{out, c.grad_dtype, i0, n, how.streaming && label < 0};
  const Target apart{room.g, sizeof(Real) == 8 ? KD_F64 : KD_F32, 0, n, false};  // by class: as Reals first
  emit(gradient, hard, rows.by_class ? apart : here);
  if (label >= 0) {
    const Real value = Real(gradient.template at<double>(label) + how.hard * label_gradient(c, s.hard));
    if (rows.by_class)
      room.g[label] = value;
    else
      store_row(out, c.grad_dtype, label + i0, 1, false, Real(0),
                [=](int64_t) { return splat<typename Vec<Real>::F>(value); });
  }
  if (rows.by_class) {
    const double smoothing = rows.smooth ? -how.hard * c.label_smoothing / s.hard.count : 0;
    put_by_class(rows, s.number, smoothing, {out, c.grad_dtype, i0, n, how.streaming}, room);
  }
  const int64_t size = element_size(c.grad_dtype);
  if (block == rows.blocks - 1 && c.grad_width > c.vocab)
    std::memset(out + c.vocab * size, 0, (c.grad_width - c.vocab) * size);
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

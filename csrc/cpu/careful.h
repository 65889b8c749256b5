// A row that the sweeps could not take, whole, in fp64.
#pragma once
#include "emit.h"
#include "value.h"
#include "../careful/careful.h"

namespace kd {
namespace KD_LEVEL {
namespace {

// What careful/ asks of the lanes of a vector.
struct Lanes {
  double sum(VD x) const {
    double s = 0;
    for (int i = 0; i < Vec<double>::W; i++) s += x[i];
    return s;
  }
  double largest(VD x) const {
    double s = x[0];
    for (int i = 1; i < Vec<double>::W; i++) s = x[i] > s ? x[i] : s;
    return s;
  }
  bool any(VL x) const {
    int64_t s = 0;
    for (int i = 0; i < Vec<double>::W; i++) s |= x[i];
    return s != 0;
  }
};

// The logits of a row as doubles, a block at a time.
class WideRow {
 public:
  static constexpr int64_t N = kBlock<double>;
  static constexpr int W = Vec<double>::W;
  template <class Real>
  WideRow(const Rows<Real> &rows, int64_t row)
      : c_(rows.c),
        student_(rows.student(row)),
        teacher_(rows.teacher(row)),
        of_z_(c_.student_scale, c_.student_softcap),
        of_v_(c_.teacher_scale, c_.teacher_softcap) {}

  // Classes [i, i + n) to z and v, padded with masked classes to whole vectors: how many that makes.
  int64_t fill(int64_t i, int64_t n) {
    load_row(student_, c_.student_dtype, i, n, z);
    load_row(teacher_, c_.teacher_dtype, i, n, v);
    if (of_z_.any()) transform_row((const double *)z, n, of_z_, z);
    if (of_v_.any()) transform_row((const double *)v, n, of_v_, v);
    const int64_t padded = round_up(n, W);
    for (int64_t j = n; j < padded; j++) z[j] = v[j] = -INFINITY;
    return padded;
  }
  template <class Body> void each(Body body) {
    for (int64_t i = 0; i < c_.vocab; i += N) {
      const int64_t n = fill(i, smaller(N, c_.vocab - i));
      for (int64_t j = 0; j < n; j += W) body(load<VD>(z + j), load<VD>(v + j));
    }
  }

  alignas(64) double z[N], v[N];

 private:
  const kd_call &c_;
  const char *const student_, *const teacher_;
  const Transform<double> of_z_, of_v_;
};

// The gradient of classes [i0, i0 + n), rounded to Reals but not yet scaled.
template <class Real, class Row64>
void careful_gradient(const Row64 &careful, WideRow &wide, int64_t i0, int64_t n, Real *soft) {
  alignas(64) double g[WideRow::N];
  for (int64_t j = 0; j < n; j += WideRow::N) {
    const int64_t m = smaller(WideRow::N, n - j), padded = wide.fill(i0 + j, m);
    for (int64_t l = 0; l < padded; l += WideRow::W)
      store(g + l, careful.gradient(load<VD>(wide.z + l), load<VD>(wide.v + l)));
    for (int64_t l = 0; l < m; l++) soft[j + l] = Real(g[l]);
  }
}

template <class Real, class Row64>
void careful_row(const Rows<Real> &rows, Row64 &careful, RowState &s, Room<Real> &room, bool streaming) {
  WideRow wide(rows, s.number);
  const auto classes = [&](auto body) { wide.each(body); };
  const double value = careful.measure(classes);
  // a factor of 0 says that the soft term is not there, whatever it would be; the student's row breaks the
  // hard term too
  CarefulValue found{};
  found.none = rows.hard && careful.broken_student() ? NAN : 0;
  if (rows.entropies) found.entropies = careful.entropies(classes);
  put_value(rows, s, value, &found, room);
  if (!rows.c.grad) return;
  Emission how = rows.emission(s, streaming);
  const bool soft_counts = rows.c.grad_scale != 0;
  Real *const soft = room.slot, *const weights = room.slot + kSlot<Real>;
  for (int64_t i = 0; i < rows.blocks; i++) {
    const int64_t n = rows.length(i);
    if (rows.hard)
      rows.with_block(s.number, i, room, [&](auto *z, const auto &) { rows.hard_block(z, n, weights); });
    if (soft_counts)
      careful_gradient(careful, wide, rows.first_class(i), n, soft);
    else
      for (int64_t j = 0; j < n; j++) soft[j] = Real(found.none);
    put_block(rows, s, i, ScaledGradient<Real>{soft, Real(soft_counts ? how.soft : 1)}, weights, how, room);
  }
}

template <class Real>
void careful_row(const Rows<Real> &rows, RowState &s, Room<Real> &room, bool streaming) {
  // the sweep stopped where the row was lost, before it had all blocks' hard terms
  if (rows.hard && !rows.plan.only_careful)
    for (int64_t i = 0; i < rows.blocks; i++)
      rows.with_block(s.number, i, room,
                      [&](auto *z, const auto &x) { s.hards[i] = rows.hard_block(z, x.n, room.slot); });
  with_careful<VD>(rows.plan, Lanes(),
                   [&](auto &careful) { careful_row(rows, careful, s, room, streaming); });
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

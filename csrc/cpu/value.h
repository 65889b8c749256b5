// A row's loss and statistics.
#pragma once
#include "rows.h"

namespace kd {
namespace KD_LEVEL {
namespace {

// The first class with the largest logit: of the block that has it, which a row that was lost has yet to look
// for.
template <class Real>
int64_t top_class(const Rows<Real> &rows, const RowState &s, bool of_base, bool lost, Room<Real> &room) {
  double top = -INFINITY;
  int64_t block = 0, at = 0;
  for (int64_t i = 0; i < rows.blocks; i++) {
    double t = of_base ? (s.parts[i].s > 0 ? s.parts[i].top : -INFINITY) : s.stats[i].top_o;
    if (lost)
      rows.with_block(s.number, i, room,
                      [&](auto *, const auto &x) { t = largest<Real>(of_base ? x.base : x.other, x.n); });
    if (t > top) {
      top = t;
      block = i;
    }
  }
  if (of_base && !lost)
    at = s.stats[block].first_b;
  else
    rows.with_block(s.number, block, room,
                    [&](auto *, const auto &x) { at = find(of_base ? x.base : x.other, x.n, Real(top)); });
  return rows.first_class(block) + at;
}

template <class Real>
void put_statistics(const Rows<Real> &rows, const RowState &s, double value, const Entropies &found,
                    bool lost, Room<Real> &room) {
  double *const out = rows.c.stats + s.number * KD_STATS;
  out[KD_DIVERGENCE] = value;
  out[KD_CROSS_ENTROPY] = rows.hard ? cross_entropy_of(s.hard) : NAN;
  out[KD_STUDENT_LSE] = found.lse_z;
  out[KD_TEACHER_LSE] = found.lse_v;
  out[KD_STUDENT_ENTROPY] = found.of_z;
  out[KD_TEACHER_ENTROPY] = found.of_v;
  const auto top_of = [&](bool of_base) {
    return broken(found) ? NAN : double(top_class(rows, s, of_base, lost, room));
  };
  out[KD_STUDENT_TOP] = top_of(rows.plan.base(true, false));
  out[KD_TEACHER_TOP] = top_of(rows.plan.base(false, true));
}

// Of a row that careful/ has measured: its entropies, and its soft term where that has no weight.
struct CarefulValue {
  Entropies entropies;
  double none;
};

// The loss of a row whose divergence is known, and its statistics; careful: null for a row that the sweeps
// took.
template <class Real>
void put_value(const Rows<Real> &rows, RowState &s, double value, const CarefulValue *careful,
               Room<Real> &room) {
  const kd_call &c = rows.c;
  Entropies found{};
  if (rows.entropies)
    found =
        careful ? careful->entropies : entropies_of(s.parts, s.stats, int(rows.blocks), s.closed, rows.plan);
  if (rows.plan.entropy) value += found.of_v;
  double loss = c.value_scale != 0 ? c.value_scale * value : careful ? careful->none : 0;
  if (rows.hard) {
    const auto part = [&](int i) -> const SmoothPart & { return s.hards[i]; };
    s.hard = close_hard(c, int(rows.blocks), part, rows.label_logit(s.number));
    loss += c.hard_scale * hard_value(c, s.hard);
  }
  c.loss[s.number] = s.weight * loss;
  if (c.stats) put_statistics(rows, s, value, found, careful != nullptr, room);
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

// The closing of a row, by a warp: from its parts to its loss, its statistics, and the factors of its tiles.
#pragma once
#include "emit.h"

namespace kd {
namespace KD_LEVEL {

KD_DEVICE double weight_at(const kd_call &c, int64_t row) { return c.weight ? c.weight[row] : 1; }
// The row with its weight and label; by one thread, before anyone writes the gradient over the label's logit.
KD_DEVICE RowAt look_up(const Job &job, int64_t row) {
  const kd_call &c = job.call;
  RowAt at = locate(job, row);
  at.weight = weight_at(c, row);
  at.label = -1;
  if (job.hard && at.weight != 0) {
    const int64_t label = c.labels[row];
    const bool known = label >= 0 && label < c.vocab;
    at.label = known ? int(label) : -1;
    at.label_logit = known ? transformed(element(at.student, label, c.student_dtype), job.student) : NAN;
  }
  return at;
}

// none: the soft term where it has no weight
KD_DEVICE double loss_of(const Job &job, double weight, double value, const HardRow &h, double none = 0) {
  const kd_call &c = job.call;
  double loss = c.value_scale != 0 ? c.value_scale * value : none;
  if (job.hard) loss += c.hard_scale * hard_value(c, h);
  return weight * loss;
}

// For a row that counts for nothing; by a thread.
KD_DEVICE void put_nothing(const kd_call &c, int64_t row) {
  c.loss[row] = 0;
  if (c.stats)
    for (int i = 0; i < KD_STATS; i++) c.stats[row * KD_STATS + i] = NAN;
}
// Of the statistics those of both softmaxes; first: the classes that have the largest logits.
KD_DEVICE void put_entropies(double *out, const Entropies &s, double first_z, double first_v) {
  out[KD_STUDENT_LSE] = s.lse_z;
  out[KD_TEACHER_LSE] = s.lse_v;
  out[KD_STUDENT_ENTROPY] = s.of_z;
  out[KD_TEACHER_ENTROPY] = s.of_v;
  out[KD_STUDENT_TOP] = broken(s) ? NAN : first_z;
  out[KD_TEACHER_TOP] = broken(s) ? NAN : first_v;
}
KD_DEVICE void put_values(const Job &job, double *out, double value, const HardRow &h) {
  out[KD_DIVERGENCE] = value;
  out[KD_CROSS_ENTROPY] = job.hard ? cross_entropy_of(h) : NAN;
}

template <class Tile>
KD_DEVICE Factors factors_of(const Tile &t, const Part &p, const Closed &row, double scale) {
  const Plan &plan = t.job.plan;
  const Coefficients k = coefficients_of<typename Tile::Family>(p, row, plan, scale);
  Factors f{float(k.A), float(k.B), float(k.C), float(k.C - k.B), 0, 1, float(k.end)};
  if (Tile::Family::kTwice && plan.base(false, true)) {
    const double student_top = top_of_student(float(p.top), t.scratch, t.job);
    f.student = float(exp_of(plan.k * ((student_top - p.top) - t.scratch.ref)));
  }
  return f;
}

// A row that is closed: factors tile by tile, flags, and, of the block that has its place, the row's loss.
template <class Tile>
KD_DEVICE void finish(const Tile &t, const Closed &row, const RowParts &x, double *loss) {
  const Job &job = t.job;
  const kd_call &c = job.call;
  const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31))));
  HardRow h;
  if (job.hard)
    h = close_hard(
        c, x.n, [&](int i) -> const SmoothPart & { return x.hards[i]; }, t.at.label_logit, WarpCrew());
  const double scale = t.at.weight * c.grad_scale, hard_scale = t.at.weight * c.hard_grad_scale;
  KD_ROLLED for (int i = lane; i < x.tiles && !row.lost; i += 32) {
    Factors f = factors_of(t, x.parts[x.mine + i], row, scale);
    if (job.hard) {
      const HardPart &own = x.hards[x.mine + i];
      if (own.s > 0) f.hard = float(hard_scale * (1 + h.pull) * exp_of(own.top - h.top) / h.s);
      if (!(t.at.label_logit == t.at.label_logit)) f.C = f.lone = NAN;
    }
    x.factors[i] = f;
  }
  gpu::sync_warp();
  if (lane != 0) return;
  auto &scratch = t.scratch;
  scratch.lost = row.lost;
  scratch.again = row.refine;
  scratch.ref = row.shift / job.plan.k;
  if (job.hard) scratch.label_gradient = hard_scale * label_gradient(c, h);
  if (job.smooth) scratch.smoothing = float(-hard_scale * c.label_smoothing / h.count);
  if (!loss) return;
  if (!row.refine) *loss = row.lost ? from_bits(kLostMark) : loss_of(job, t.at.weight, row.value, h);
  if (c.stats) put_values(job, c.stats + (loss - c.loss) * KD_STATS, row.value, h);
}

// To the statistics, and of the cross entropy to the row's value.
template <class Tile>
KD_DEVICE void close_entropies(const Tile &t, const RowParts &x, Closed &row, const double *loss) {
  const Job &job = t.job;
  const WarpCrew crew;
  const Entropies found = entropies_of(x.parts, x.stats, x.n, row, job.plan, crew);
  if (job.plan.entropy) row.value += found.of_v;
  const int b = highest_part(x.parts, x.n, crew),
            o = crew.first(x.n, [&](int i) { return x.stats[i].top_o; });
  const double first_b = x.stats[b].first_b, first_o = x.stats[o].first_o;
  double *const out = job.call.stats + (loss - job.call.loss) * KD_STATS;
  if ((gpu::thread() & 31) == 0 && job.call.stats)
    put_entropies(out, found, job.plan.student(first_b, first_o), job.plan.teacher(first_b, first_o));
}

// The row's shift, for its second sweep, and flags.
template <class Tile> KD_DEVICE void put_shift(const Tile &t, const Closed &row, double *loss) {
  const double ref = row.shift / t.job.plan.k;
  const float high = float(ref), low = float(ref - high);
  auto &scratch = t.scratch;
  scratch.lost = row.lost;
  scratch.again = row.refine;
  scratch.ref = ref;
  scratch.ref_high = high;
  scratch.ref_low = low;
  scratch.ref_rest = float(t.job.plan.k * ((ref - high) - low) * kLog2e);
  if (loss && row.lost) *loss = from_bits(kLostMark);
}

// After the first sweep. A row of the mixture family is not done with that.
template <class Tile> KD_DEVICE void close(const Tile &t, const RowParts &x, double *loss) {
  using Family = typename Tile::Family;
  const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31))));
  int care = 0;
  KD_ROLLED for (int i = lane; i < x.n; i += 32) if (x.parts[i].care > care) care = x.parts[i].care;
  Closed row;
  row.lost = gpu::warp_largest(care) == kLost;
  if (!row.lost) row = close_row<Family>(x.parts, x.n, t.job.plan, WarpCrew());
  if (t.scratch.again) row.refine = false;
  if (loss && t.job.entropies && !row.lost) close_entropies(t, x, row, loss);
  if constexpr (!Family::kTwice) return finish(t, row, x, loss);
  gpu::sync_warp();
  if (lane == 0) put_shift(t, row, loss);
}
// And after the second, whose sums the parts have now.
template <class Tile> KD_DEVICE void close_again(const Tile &t, const RowParts &x, double *loss) {
  Closed row;
  close_second(x.parts, x.n, t.job.plan.mixture, row, WarpCrew());
  row.shift = t.scratch.ref * t.job.plan.k;
  finish(t, row, x, loss);
}

}  // namespace KD_LEVEL
}  // namespace kd

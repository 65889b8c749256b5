// The closing of a row after its first sweep: from its blocks' parts to its shift, F, value and gain.
//
// Blocks are merged in their order, whatever ran where, so that results do not depend on the number of
// threads. No sum has terms of both signs that could cancel. With u a block's unit and h = shift - offset:
//     1 = sum u e^{-h} (s + d)        F = sum of Family::of_block
#pragma once
#include "part.h"

namespace kd {
namespace KD_LEVEL {

// The largest distance of two rows' log-sum-exps, in logits. Beyond it (a row masked as a whole) o - b and
// its reference are rounded to more than the other row's digits.
constexpr double kFarthest = 0x1p28;

template <class Crew> KD_HD int highest_part(const Part *parts, int n, const Crew &crew) {
  return crew.first(n, [&](int i) { return parts[i].s > 0 ? parts[i].top : -INFINITY; });
}

// The row's top and total, and each part's unit, still to be divided by the total.
template <class Crew>
KD_HD void close_total(Part *parts, int n, const Plan &plan, Closed &r, const Crew &crew) {
  const int highest = highest_part(parts, n, crew);
  if (parts[highest].s > 0) r.top = larger(parts[highest].top, r.top);
  double total[1]{};
  crew.sum(n, total, [&](int i, double (&sum)[1]) {
    Part &p = parts[i];
    p.unit = p.empty() ? 0 : exp_of(plan.k * (p.top - r.top));
    sum[0] += p.s * p.unit;
  });
  r.total = total[0];
}

// The row's shift, measured from the offset of the heaviest part; each part's unit. False: the row is lost.
template <class Crew> KD_HD bool close_shift(Part *parts, int n, Closed &r, const Crew &crew) {
  const int heaviest = crew.first(n, [&](int i) { return parts[i].s * parts[i].unit; });
  if (!(parts[heaviest].s * parts[heaviest].unit > 0) || !std::isfinite(r.total)) return false;
  const double origin = parts[heaviest].offset;
  // e^{shift - origin} - 1; e^{shift - origin} as a sum of positive terms; the parts that are out of range;
  // what the base has where there are masks
  double sums[4]{};
  crew.sum(n, sums, [&](int i, double (&sum)[4]) {
    Part &p = parts[i];
    if (p.empty()) return;
    p.unit /= r.total;
    const double far = p.offset - origin, x = expm1_of(far), all = exp_of(far);  // x + 1 would be rounded
    if (!(std::fabs(far) <= 500)) {
      sum[2] += 1;
      return;
    }
    sum[0] += p.unit * (p.s * x + p.d * all);
    sum[1] += p.unit * (p.s + p.d) * all;
    if (p.care == kMasked) sum[3] += p.unit * p.s * all;
  });
  // A class that only the base has is -e in d: where those are nearly all of the base, s + d has lost its
  // digits.
  if (sums[2] > 0 || sums[3] > 8 * sums[1]) return false;
  r.shift = origin + (std::fabs(sums[0]) < .5 ? log1p_of(sums[0]) : log_of(sums[1]));
  return true;
}

template <class Family, class Crew = Alone>
KD_HD Closed close_row(Part *parts, int n, const Plan &plan, const Crew &crew = {}) {
  Closed r;
  close_total(parts, n, plan, r, crew);
  if (!close_shift(parts, n, r, crew)) {
    r.lost = true;
    return r;
  }
  double sums[3]{};  // F, what its terms would be without their signs, R
  crew.sum(n, sums, [&](int i, double (&sum)[3]) {
    const Part &p = parts[i];
    if (p.empty()) return;
    const auto x = Family::of_block(p, r.shift - p.offset, plan);
    sum[0] += p.unit * (x.own + x.still + x.cross);
    sum[1] += p.unit * (x.own + x.still + std::fabs(x.cross));
    sum[2] += x.weights;
  });
  r.F = sums[0];
  Family::put_R(r, sums[2]);
  const bool finite = std::isfinite(r.shift) && std::isfinite(r.F) && std::isfinite(r.R);
  // R = 0: the two have no class in common
  if (!finite || std::fabs(r.shift) > plan.k * kFarthest || !(r.R > 0)) {
    r.lost = true;
    return r;
  }
  r.F = larger(r.F, 0.);
  r.refine = Family::may_refine(r) && sums[1] > plan.patience * r.F;
  Family::put_value(r, plan);
  return r;
}

// T dD/dz of a block, times scale.
template <class Family>
KD_HD Coefficients coefficients_of(const Part &p, const Closed &r, const Plan &plan, double scale) {
  return p.empty() ? Coefficients{0, 0, 0} : Family::coefficients(p, r, plan, scale);
}

}  // namespace KD_LEVEL
}  // namespace kd

// Log-sum-exps and entropies of a row that is closed: the cross entropy's value and the statistics.
#pragma once
#include "close.h"

namespace kd {
namespace KD_LEVEL {

// Log-sum-exps of z/T and v/T, and the entropies of their softmaxes.
struct Entropies { double lse_z, lse_v, of_z, of_v; };
KD_HD bool broken(const Entropies &s) { return !(s.lse_z - s.lse_z == 0) || !(s.lse_v - s.lse_v == 0); }

// sum eo a_o / T from brief logs (step.h), as e y = em - e psi(y).
KD_HD double other_log(const Part &p, double log_b, double brief) {
  return log_b + brief + (p.d - p.first.psi);
}

// logs: of the parts, StatParts or what begins like them. The base's entropy, sum p (log total - log e),
// keeps its own digits also where one class has nearly all of p: log total is log1p of the others.
template <class Logs, class Crew = Alone>
KD_HD Entropies entropies_of(const Part *parts, const Logs *logs, int n, const Closed &r, const Plan &plan,
                             const Crew &crew = {}) {
  const double log_total = log_of(r.total);
  const int highest = highest_part(parts, n, crew);
  double others[1]{};
  crew.sum(n, others, [&](int i, double (&sum)[1]) {
    sum[0] += i == highest ? logs[i].rest : parts[i].unit * parts[i].s * r.total;
  });
  double sums[2]{};  // of -p log p for the base and for the other
  crew.sum(n, sums, [&](int i, double (&sum)[2]) {
    const Part &p = parts[i];
    if (p.s > 0) sum[0] += p.unit * (p.s * (plan.k * (r.top - p.top) + log1p_of(others[0])) - logs[i].log_b);
    if (p.empty()) return;
    const double h = r.shift - p.offset, log_unit = plan.k * (p.top - r.top) - log_total;
    sum[1] -= p.unit * exp_of(-h) * ((log_unit - h) * (p.s + p.d) + logs[i].log_o);
  });
  const double base = plan.k * r.top + log_total, other = base + r.shift;
  return {plan.student(base, other), plan.teacher(base, other), plan.student(sums[0], sums[1]),
          plan.teacher(sums[0], sums[1])};
}

}  // namespace KD_LEVEL
}  // namespace kd

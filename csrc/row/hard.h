// The hard term: a cross entropy of the student's softmax at T = 1, with label smoothing and the z-loss.
#pragma once
#include "part.h"

namespace kd {
namespace KD_LEVEL {

// Of a block: its largest logit, the sum of e^{z - top}, and that without the largest class.
struct HardPart { double top = -INFINITY, s = 0, rest = 0; };
// Of label smoothing: how far the classes that are there lie below the largest, and how many they are.
struct SmoothPart : HardPart { double below = 0, count = 0; };
// A row: also the label's logit, the log-sum-exp, and pull, by which the z-loss's gradient is pull q.
struct HardRow : SmoothPart { double label = NAN, log_sum = 0, pull = 0; };

// e^{z - top} of a class.
template <class F> KD_HD F step_hard(F z, RealOf<F> top, F &rest, F &ties) {
  using Real = RealOf<F>;
  const Real c = Real(kLog2e);
  const F a = z - top, e = exp2_of_product(a, c, Exp2<Real>::kFloor / c);
  rest += select(a == Real(0), F{}, e);
  ties += select(a == Real(0), splat<F>(1), F{});
  return e;
}

template <class Of, class Crew = Alone> KD_HD HardPart merge_hard(int n, Of of, const Crew &crew = {}) {
  HardPart r;
  const int highest = crew.first(n, [&](int i) { return of(i).top; });
  if (!(of(highest).top > -INFINITY)) return r;
  r.top = of(highest).top;
  double rest[1]{of(highest).rest};
  crew.sum(n, rest, [&](int i, double (&sum)[1]) {
    if (i != highest && of(i).s > 0) sum[0] += of(i).s * exp_of(of(i).top - r.top);
  });
  r.rest = rest[0];
  r.s = 1 + r.rest;
  return r;
}

// The row from its parts, of(i) for i < n.
template <class Of, class Crew = Alone>
KD_HD HardRow close_hard(const kd_call &c, int n, Of of, double label, const Crew &crew = {}) {
  HardRow r;
  (HardPart &)r = merge_hard(n, of, crew);
  r.label = label;
  r.log_sum = r.top + log1p_of(r.rest);
  r.pull = c.z_loss != 0 ? 2 * c.z_loss * r.log_sum : 0;
  if (c.label_smoothing == 0) return r;
  double sums[2]{};
  crew.sum(n, sums, [&](int i, double (&sum)[2]) {
    const SmoothPart &p = of(i);
    if (p.count > 0) sum[0] += p.below + p.count * (r.top - p.top);
    sum[1] += p.count;
  });
  r.below = sums[0];
  r.count = sums[1];
  return r;
}

// nan where the largest logit is infinite.
KD_HD double cross_entropy_of(const HardRow &h) {
  return log1p_of(h.rest) + (h.top - h.label) + (h.top - h.top);
}
KD_HD double hard_value(const kd_call &c, const HardRow &h) {
  double value = cross_entropy_of(h);
  if (c.label_smoothing != 0)
    value = (1 - c.label_smoothing) * value + c.label_smoothing * (log1p_of(h.rest) + h.below / h.count);
  return value + (c.z_loss != 0 ? c.z_loss * h.log_sum * h.log_sum : 0);
}

// The gradient at the label, but for what label smoothing takes off every class: q - 1 from the other
// classes, exact where q rounds to 1.
KD_HD double label_gradient(const kd_call &c, const HardRow &h) {
  const double below = expm1_of(h.label - h.top);
  return (below - h.rest) / h.s + c.label_smoothing + h.pull * (1 + below) / h.s;
}

// Whether a call has a hard term.
KD_HD bool has_hard(const kd_call &c) { return c.labels && (c.hard_scale != 0 || c.hard_grad_scale != 0); }

}  // namespace KD_LEVEL
}  // namespace kd

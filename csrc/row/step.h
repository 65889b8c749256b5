// The first sweep of a class, or of a vector of them: e and y, the family's terms, and their sums.
#pragma once
#include "plain.h"

namespace kd {
namespace KD_LEVEL {

// Sums that entropies are made of: s without the largest classes, how many those are, and of each
// distribution weight times logarithm, in units of T. kBothLogs sums e a and eo a_o, with eo = e + em.
// kBriefLogs sums em a_o in place of the latter, where both have every class: other_log gives the rest.
enum Logs { kNoLogs, kBothLogs, kBriefLogs };
template <class F> struct LogSums {
  F others{}, ties{}, log_b{}, log_o{};
  template <class Op, class To> KD_HD void each(To &to, Op op) const {
    op(to.log_b, log_b);
    op(to.log_o, log_o);
    op(to.others, others);
    op(to.ties, ties);
  }
};

// farthest: bits of the largest |y|, or all ones after a class that no finite formula takes.
template <class Family, class F> struct FirstSums : Family::template Sums<F> {
  LogSums<F> logs;
  IntOf<F> farthest{};
};

template <Logs kLogs, bool kMask, class F> KD_HD void add_logs(LogSums<F> &s, F e, F em, F a, F o_at) {
  using Real = RealOf<F>;
  const F zero{}, eo = e + em, weight = kLogs == kBriefLogs ? em : eo;
  s.others += select(a == Real(0), zero, e);
  s.ties += select(a == Real(0), splat<F>(1), zero);
  // 0 log 0 = 0: e is exactly 0 where its logarithm is not finite
  s.log_b += kMask ? select(e > zero, e * a, zero) : e * a;
  s.log_o += kMask ? select((kLogs == kBriefLogs ? e : eo) > zero, weight * o_at, zero) : weight * o_at;
}

template <class Family, bool kCarry, bool kMask, Logs kLogs = kNoLogs, class F>
KD_HD typename Family::template Kept<F> step(F b, F o, const Reference<RealOf<F>> &r,
                                             FirstSums<Family, F> &s) {
  using Real = RealOf<F>;
  using Int = IntOf<F>;
  constexpr Real kInf = Real(INFINITY);
  const F zero{}, a = b - r.top, t = difference<kCarry>(o, b, r);
  const F e = exp2_of_product(a, r.c, r.floor);
  // in base 2 from here on, ((o - b) - ref) log2(e) / T, as math/exp.h takes it
  F y = kCarry ? t * r.c + t * r.c_low : t * r.c, o_at = a + t;
  Int no_b{}, no_o{};
  if (kMask) {
    no_b = b == -kInf;
    no_o = o == -kInf;
    y = select(no_b | no_o, zero, y);
  }
  const Int far = bits(y) & Exp2<Real>::kAbs;  // |y|; inf and nan are larger than every number
  s.farthest = far > s.farthest ? far : s.farthest;
  auto x = Family::terms(e, y, r);
  if (kMask) {
    const F from_top = difference<kCarry>(o, splat<F>(r.top), r);
    Lone<F> lone;
    lone.only_o = no_b & ~no_o;
    lone.only_b = no_o & ~no_b;
    lone.o_weight = exp2_of_product(from_top, r.c, r.floor);
    lone.within = from_top * r.c <= r.reach;
    o_at = select(lone.only_o, from_top, o_at);
    const Int lost = Family::take_lone(x, lone, r);
    s.farthest = lost ? Int{} + Exp2<Real>::kAbs : s.farthest;
  }
  Family::add(x, s);
  if (kLogs != kNoLogs) add_logs<kLogs, kMask>(s.logs, x.e, x.em, a, o_at);
  if (kMask) Family::hide(x, no_o, r);
  return Family::keep(x);
}

}  // namespace KD_LEVEL
}  // namespace kd

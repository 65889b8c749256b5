// One row, the part that is the same on every device: the step of one element, the sums of a block, their
// merge and the closing of a row.
//
// A block is any set of classes of the row with its own references: top, the largest base logit, and ref, the
// difference o - b there.
//     e = e^{(b - top)/T}     y = ((o - b) - ref)/T     em = e expm1(y)     et = e expm1(tilt y)
// A row's gradient is linear in the three, with coefficients that are known when the row is closed:
//     q - w = A em + B et + C e        (one triple of coefficients for each block)
// so the exponentials are computed once and kept, or computed again where there is no room to keep them; both
// give the same bits. The mixture family is not linear in what a reference lacks: its rows are swept again
// with the row's own shift, from which each class gets its G, and q, in which the gradient is linear once M =
// sum G is known. A sum is never formed from terms of both signs that could cancel; everything per block and
// per row is fp64.
#pragma once
#include "plan.h"

namespace kd {
namespace KD_LEVEL {

template <class Real> struct References {
  Real top, ref, ref_low;  // ref + ref_low: the reference in twice the precision, for kExact
  Real c, c_low, tilt;     // c + c_low likewise
  Real floor;              // smallest (b - top) that is not flushed: kFloor / c
  Real reach;              // largest |y| in base 2 that the exponentials take
  bool other_is_student;
};

// others, ties: s without the largest classes, and how many those are; log_b, log_o: in units of T
template <class F> struct Sums { F s{}, d{}, k1{}, k2{}, t{}, others{}, ties{}, log_b{}, log_o{}; };
// kMixed: e^y - 1 for em
template <class F> struct Kept { F e, em, et; };

// what is summed besides e, em and e psi; kMixed: the same, less exactly
enum Shape { kPlain, kTilted, kMixed };
// kExact: (o - b)/T without its rounding errors; kMasked: and -inf logits
enum Care { kFast, kExact, kMasked };
// What entropies are made of: e a and eo a_o, of eo = e + em; or, where both have every class, em a_o alone,
// as (other_log) gives the rest.
enum Logs { kNoLogs, kBothLogs, kBriefLogs };

// What the rounding of o - b has lost, exactly.
template <class F> KD_HD F lost_in_difference(F o, F b) {
  const F hi = o - b, back = hi - o;
  return (o - (hi - back)) - (b + back);
}
// o - b - ref. The rounding of o - b matters when a common offset is much larger than what remains of the
// difference.
template <bool kCarry, class F>
KD_HD F difference(F o, F b, typename Element<F>::Real ref, typename Element<F>::Real ref_low) {
  const F hi = o - b;
  return kCarry ? (hi - ref) + (lost_in_difference(o, b) - ref_low) : hi - ref;
}

// One element (or a vector of them). wild: bits of the largest |y|, or all ones for what no finite formula
// takes.
template <Shape kShape, bool kCarry, bool kMask, Logs kLogs = kNoLogs, class F>
KD_HD Kept<F> step(F b, F o, const References<typename Element<F>::Real> &r, Sums<F> &s,
                   typename Element<F>::Int &wild) {
  using Real = typename Element<F>::Real;
  using Int = typename Element<F>::Int;
  constexpr Real kInf = Real(INFINITY);
  const F zero{}, a = b - r.top;
  const F t = difference<kCarry>(o, b, r.ref, r.ref_low);
  F e = exp2_of_product(a, r.c, r.floor), y = kCarry ? t * r.c + t * r.c_low : t * r.c;
  Int no_b{}, no_o{};
  if (kMask) {
    no_b = b == -kInf;
    no_o = o == -kInf;
    y = select(no_b | no_o, zero, y);
  }
  const Int far = bits(y) & Exp2<Real>::kAbs;  // |y|; inf and nan come out on top
  wild = far > wild ? far : wild;
  const ExpM1<F> m = expm1_psi(y);
  // o_at: a for the other
  F em = e * m.m1, k1 = e * (kShape == kMixed ? m.m1 - y * Real(kLn2) : m.psi), et{}, k2{}, o_at = a + t;
  if (kShape == kTilted) {
    const ExpM1<F> mt = expm1_psi(y * r.tilt);
    et = e * mt.m1;
    k2 = e * mt.psi;
  }
  if (kMask) {
    // p = 0 < q and the reverse, as limits: the terms of F stay finite where the divergence does
    const Int only_o = no_b & ~no_o, only_b = no_o & ~no_b;
    const F x = difference<kCarry>(o, splat<F>(r.top), r.ref, r.ref_low),
            q = exp2_of_product(x, r.c, r.floor);
    em = select(only_o, q, em);
    k1 = select(only_o, q, k1);
    o_at = select(only_o, x, o_at);
    const Int within = x * r.c <= r.reach;
    Int lost = only_o & ~within;
    if (kShape == kTilted) {
      em = select(only_b, -e, em);
      et = select(only_b, -e, et);
      k1 = select(only_b, zero, k1);
      k2 = select(only_b, (r.tilt - Real(1)) * e, k2);
      if (r.tilt < 0) lost |= only_b;
    } else {
      lost |= only_b;
    }
    wild = lost ? Int{} + Exp2<Real>::kAbs : wild;
  }
  s.s += e;
  s.d += em;
  s.k1 += k1;
  if (kLogs != kNoLogs) {
    const F eo = e + em, weight = kLogs == kBriefLogs ? em : eo;
    s.others += select(a == Real(0), zero, e);
    s.ties += select(a == Real(0), splat<F>(1), zero);
    // 0 log 0 = 0: e is exactly 0 where its logarithm is not finite
    s.log_b += kMask ? select(e > zero, e * a, zero) : e * a;
    s.log_o += kMask ? select((kLogs == kBriefLogs ? e : eo) > zero, weight * o_at, zero) : weight * o_at;
  }
  if (kShape == kTilted) {
    s.k2 += k2;
    s.t += e + et;
    // the student's own mask: sums count the class, the gradient does not
    if (kMask && r.other_is_student) {
      e = select(no_o, zero, e);
      em = select(no_o, zero, em);
      et = select(no_o, zero, et);
    }
  }
  return {e, kShape == kMixed ? m.m1 : em, et};
}

// y of the second sweep, x in base 2. rest, in base 2: what the references' rounding has left.
template <bool kCarry, class F>
KD_HD F deviation(F b, F o, const References<typename Element<F>::Real> &r, typename Element<F>::Real rest) {
  const F t = difference<kCarry>(o, b, r.ref, r.ref_low);
  return kCarry ? t * r.c + (t * r.c_low - rest) : t * r.c - rest;
}

// TVD's xi: 0 where the student has more of the class than the teacher, -1 where it has less, -1/2 where they
// are equal. So M is minus what the student has of the others, a sum of one sign: where q is nearly one-hot,
// q (xi - M) is q of its class times the little that is left.
template <class F> KD_HD F tvd_side(F gap, bool student_base) {  // gap: of the sign of o - b
  const F zero{}, less = splat<F>(-1);
  return select(gap > zero, student_base ? less : zero,
                select(gap < zero, student_base ? zero : less, splat<F>(-.5)));
}

// One element of the second sweep of the mixture family, whose y is x itself: q in units of e, and xi, of
// which G = q xi; sums of the terms of D (k1) and of G (d). TVD sums what q has more (k1), what p has more
// (k2), and the base of the former with half of that where they are equal (t). eo is e e^x.
template <bool kCarry, bool kMask, class F, class Mix>
KD_HD Kept<F> step_mixed(F b, F o, const References<typename Element<F>::Real> &r, const Mix &mix,
                         typename Element<F>::Real rest, F e, F eo, Sums<F> &s,
                         typename Element<F>::Int &wild) {
  using Real = typename Element<F>::Real;
  using Int = typename Element<F>::Int;
  constexpr Real kInf = Real(INFINITY);
  const F zero{};
  F y = deviation<kCarry>(b, o, r, rest);
  Int no_b{}, no_o{};
  if (kMask) {
    no_b = b == -kInf;
    no_o = o == -kInf;
    y = select(no_b | no_o, zero, y);
  }
  const Int far = bits(y) & Exp2<Real>::kAbs;
  wild = far > wild ? far : wild;
  F q = mix.student_base ? e : eo, term, xi;
  if (mix.tvd) {
    const F em = e * expm1_psi(y).m1;
    xi = tvd_side(em, mix.student_base);
    term = larger(em, zero);
    s.k2 += larger(-em, zero);
  } else {
    const MixedTerm<F> m = mixed_class(y, far, mix);
    term = e * m.term;
    xi = m.xi;
  }
  if (kMask) {
    const Int only_o = no_b & ~no_o, only_b = no_o & ~no_b, none = no_b & no_o;
    const F far_o = difference<kCarry>(o, splat<F>(r.top), r.ref, r.ref_low),
            weight = exp2_of_product(far_o, r.c, r.floor);
    // TVD's b_alone is 0
    term =
        select(none, zero,
               select(only_o, mix.other_alone_term * weight, select(only_b, mix.base_alone_term * e, term)));
    q = select(
        none, zero,
        select(only_o, mix.student_base ? zero : weight, select(only_b, mix.student_base ? e : zero, q)));
    xi = select(only_o, splat<F>(mix.other_alone_xi), select(only_b, splat<F>(mix.base_alone_xi), xi));
    if (mix.tvd) s.k2 += select(only_b, e, zero);
    const Int within = far_o * r.c <= r.reach;
    Int lost = only_o & ~within;
    if (!(mix.other_alone_term < kInf)) lost |= only_o;  // D is +inf
    wild = lost ? Int{} + Exp2<Real>::kAbs : wild;
  }
  s.k1 += term;
  s.d += q * xi;
  if (mix.tvd) s.t += e + e * xi;
  return {q, xi, zero};
}

// The same where nothing is masked, from what the first sweep has kept: e and share = e^x - 1. With u = log(m
// / b) and w = log(o / m), in base 2:
//     kTvdGap    TVD
//     kReverse   reverse KL, l = 0: sums of eo y
//     kOfBase    the divergence of b from m alone: sums of e psi(u), as of D no more than an l^2 is left
//     kOfOther   that of o alone: sums of eo w
//     kJoint     both, with the weights of JSD: sums of e u and eo w
// But for kTvdGap and kOfBase the sums' terms are of both signs, and have rounding errors of the size of x
// where step_mixed has them of each term's, x^2: second_of asks for rows where that is no more than 1e-6 of
// D.
enum Second { kByClass, kTvdGap, kReverse, kOfBase, kOfOther, kJoint };
KD_HD Second second_of(const Plan &plan, double F) {
  const Mixed<double> &mix = plan.mixture;
  constexpr double kLeast = .03;
  if (plan.tvd) return kTvdGap;
  if (F < kLeast) return kByClass;
  if (mix.l == 0) return kReverse;
  if (mix.c_other == 0) return kOfBase;
  if (mix.c_base == 0) return F * mix.co_l * mix.co_l > kLeast ? kOfOther : kByClass;
  return mix.share_weight == 0 && F > 4 * kLeast ? kJoint : kByClass;
}
// kLast: the row may end within the vector; there is neither b nor o then.
template <Second kHow, bool kLast, class F, class Mix>
KD_HD Kept<F> step_kept(F b, F o, const References<typename Element<F>::Real> &r, const Mix &mix,
                        typename Element<F>::Real rest, F e, F share, Sums<F> &s) {
  using Real = typename Element<F>::Real;
  const F zero{}, gap = e * share, eo = e + gap, more = share * mix.l, q = mix.student_base ? e : eo;
  F y = deviation<false>(b, o, r, rest), xi;
  if (kLast) y = select(b == -Real(INFINITY), zero, y);
  if (kHow == kTvdGap) {
    xi = tvd_side(y, mix.student_base);
    s.k1 += larger(gap, zero);
    s.k2 += larger(-gap, zero);
    s.t += e + e * xi;
    s.d += q * xi;
  } else if (kHow == kReverse) {
    s.t += eo * y;
    xi = mix.student_base ? share * -mix.c_other : y * (mix.c_other * Real(kLn2));
  } else if (kHow == kOfBase) {
    const Log1p<F> u = log1p_psi(more);
    s.s += e * u.psi;
    xi = mix.student_base ? u.log * -mix.cancel_log -
                                (more * u.log - u.psi) * quotient(splat<F>(mix.cancel_psi), more + Real(1))
                          : quotient(share * mix.share_weight, more + Real(1));
    s.d += q * xi;
  } else if (kHow == kOfOther) {
    const F w = y - log2_of_1p(more), v = quotient(share * mix.co_l, more + Real(1));
    s.t += eo * w;
    xi = mix.student_base ? v * -(mix.co_l * mix.c_other)
                          : w * (mix.c_other * Real(kLn2)) - v * (mix.l * mix.c_other);
    s.d += q * xi;
  } else {
    const F u = log2_of_1p(more), w = y - u;
    s.s += e * u;
    s.t += eo * w;
    xi = mix.student_base ? u * (mix.c_base * Real(-kLn2)) : w * (mix.c_other * Real(kLn2));
  }
  return {q, xi, zero};
}

// e again, as step returned it, where the rest was kept and nothing is masked.
template <class F> KD_HD F weight_of(F b, const References<typename Element<F>::Real> &r) {
  return exp2_of_product(b - r.top, r.c, r.floor);
}

// The hard term's softmax at T = 1, from the same student logits: e1 = e^{z - top}.
template <class F> KD_HD F step_hard(F z, typename Element<F>::Real top, F &rest, F &ties) {
  using Real = typename Element<F>::Real;
  const Real c = Real(kLog2e);
  const F a = z - top, e = exp2_of_product(a, c, Exp2<Real>::kFloor / c);
  rest += select(a == Real(0), F{}, e);
  ties += select(a == Real(0), splat<F>(1), F{});
  return e;
}

// ---------------------------------------------------------------- blocks and rows
struct Part {
  double top = -INFINITY, ref = 0;
  double offset = 0;  // ref as the step took it, in natural units
  double s = 0;       // sum e; 0 where the base has no class
  double d = 0;       // sum of em
  // sums of e psi(y), e psi(tilt y), e + et; after its second sweep the mixture
  // family's: of the terms of D (TVD: of what q has more), TVD's of what p has more, and of p where q has
  // more (step_mixed), of G. No words of their own: csrc/cuda sends parts about
  union {
    double k1 = 0;
    double terms;
  };
  union {
    double k2 = 0;
    double lacks;
  };
  union {
    double t = 0;
    double excess;
  };
  double moved = 0;
  double unit = 0;  // what e = 1 stands for in the row: e^{(top - row's top)/T} / total
  int care = kFast;
  bool lone = false;  // of kMasked, on the CPU: a class that only one of the two has
  KD_HD bool empty() const { return s == 0 && d == 0; }
};

// For the entropies and the statistics of a row: sums of e log e and of eo log eo; s - 1 to its own digits;
// the largest logit of the other. first_b: where in the block the base's largest is
struct StatPart {
  double log_b = 0, log_o = 0, rest = 0, top_o = -INFINITY;
  int64_t first_b = 0;
};
// sum eo a_o / T from brief logs: e y = em - e psi(y).
KD_HD double other_log(const Part &p, double log_b, double brief) { return log_b + brief + (p.d - p.k1); }
// log-sum-exps and entropies of a row's student and teacher
struct Shapes { double lse_z, lse_v, of_z, of_v; };

struct HardPart { double top = -INFINITY, s = 0, rest = 0; };
// With label smoothing also how far the classes that are there lie below the largest, and how many they are.
struct SmoothPart : HardPart { double below = 0, count = 0; };
// Of a row that is closed: the label's logit, the log-sum-exp, and of the z-loss's gradient, pull q.
struct HardRow : SmoothPart { double label = NAN, log_sum = 0, pull = 0; };

struct Row {
  double top = -INFINITY, total = 0;  // largest base logit, sum of e^{(b - top)/T}
  double shift = 0;                   // log sum b e^{(o - b)/T}, with b normalised: o's log-sum-exp minus b's
  double F = 0, R = 1, log_r = 0, value = 0;
  double gain = 1;    // of the gradient: T dD/dz = gain (q - w)
  double moved = 0;   // M of the mixture family
  double above = 0;   // TVD: 1 + M to its own digits
  bool lost = false;  // outside the range of the step: careful.h
  // the references were far from shift: sweep again with shift as everyone's
  bool refine = false;
};

// end: of TVD, C - A to its own digits, what a class with xi = -1 has
struct Coefficients { double A, B, C, end = 0; };
// What A xi + C lacks of that once A and C are rounded. Where `end` is the larger of the two, C is the one
// that counts, and nothing is added.
template <class Real> KD_HD Real left_over(Real A, Real C, Real end) {
  return std::fabs(end) < std::fabs(C) ? end - (C - A) : Real(0);
}

// Who closes a row: one thread, block after block; or (csrc/cuda) the lanes of a warp, a block to a lane. sum
// adds f(i, sums) over all i < n; first is the least i with the largest f(i).
struct Alone {
  template <int N, class Add> KD_HD void sum(int n, double (&sums)[N], Add add) const {
    for (int i = 0; i < n; i++) add(i, sums);
  }
  template <class Of> KD_HD int first(int n, Of of) const {
    int best = 0;
    for (int i = 1; i < n; i++)
      if (of(i) > of(best)) best = i;
    return best;
  }
};

constexpr double kFarthest = 0x1p28;  // of two rows' log-sum-exps, in logits

// Blocks are merged in their order, whatever ran where, so that results do not depend on the number of
// threads. With u the block's unit and h = shift - offset what its y still has to lose:
//     1 = sum u e^{-h} (s + d)
//     F = sum u (e^{-tilt h} F_block + s f(-h) + d (expm1(-h) - expm1(-tilt h)) / (1 - tilt))
template <class Crew = Alone>
KD_HD Row close_row(Part *parts, int n, const Plan &plan, const Crew &crew = {}) {
  Row r;
  const int highest = crew.first(n, [&](int i) { return parts[i].s > 0 ? parts[i].top : -INFINITY; });
  if (parts[highest].s > 0) r.top = larger(parts[highest].top, r.top);
  double total[1]{};
  crew.sum(n, total, [&](int i, double (&sum)[1]) {
    Part &p = parts[i];
    p.unit = p.empty() ? 0 : exp_of(plan.k * (p.top - r.top));
    sum[0] += p.s * p.unit;
  });
  r.total = total[0];
  const int heaviest = crew.first(n, [&](int i) { return parts[i].s * parts[i].unit; });
  if (!(parts[heaviest].s * parts[heaviest].unit > 0) || !std::isfinite(r.total)) {
    r.lost = true;
    return r;
  }

  const double origin = parts[heaviest].offset;
  // e^{shift - origin} - 1, and e^{shift - origin} as a sum of positive terms; blocks out of range; what the
  // base has where there are masks
  double moved[4]{};
  crew.sum(n, moved, [&](int i, double (&sum)[4]) {
    Part &p = parts[i];
    if (p.empty()) return;
    p.unit /= r.total;
    // not x + 1, which rounds
    const double far = p.offset - origin, x = expm1_of(far), all = exp_of(far);
    if (!(std::fabs(far) <= 500)) {
      sum[2] += 1;
      return;
    }
    sum[0] += p.unit * (p.s * x + p.d * all);
    sum[1] += p.unit * (p.s + p.d) * all;
    if (p.care == kMasked) sum[3] += p.unit * p.s * all;
  });
  // classes that the base alone has are -e in d: where they are nearly all of the base, little is left of s +
  // d
  if (moved[2] > 0 || moved[3] > 8 * moved[1]) {
    r.lost = true;
    return r;
  }
  r.shift = origin + (std::fabs(moved[0]) < .5 ? log1p_of(moved[0]) : log_of(moved[1]));

  double sums[3]{};  // F, what its terms would be without their signs, R
  crew.sum(n, sums, [&](int i, double (&sum)[3]) {
    const Part &p = parts[i];
    if (p.empty()) return;
    const double h = r.shift - p.offset, x = expm1_of(-h), b = plan.tilt;
    double own = p.k1, still = p.s * f_of(-h, plan.tilt), cross = p.d * x;
    if (plan.tilted) {
      const double all = exp_of(-b * h);
      // not expm1(-h) - expm1(-b h), both -1
      own = all * (p.k1 - p.k2 / b) / (1 - b);
      cross = p.d * all * expm1_of(-(1 - b) * h) / (1 - b);
      sum[2] += p.unit * all * p.t;
    }
    sum[0] += p.unit * (own + still + cross);
    sum[1] += p.unit * (own + still + std::fabs(cross));
  });
  r.F = sums[0];
  if (plan.tilted) r.R = sums[2];
  const bool finite = std::isfinite(r.shift) && std::isfinite(r.F) && std::isfinite(r.R);
  // In a row that lies farther from the other (masked as a whole), o - b and its reference are rounded to
  // more than the other's digits.
  const bool distant = std::fabs(r.shift) > plan.k * kFarthest;
  if (!finite || distant || !(r.R > 0)) {
    r.lost = true;
    return r;
  }  // R = 0: no class in common
  r.F = larger(r.F, 0.);
  r.refine = (!plan.tilted || near_one(r.R)) && sums[1] > plan.patience * r.F;
  r.log_r = plan.tilted ? log_of_R(r.F, r.R, plan.tilt) : 0;
  const bool alpha = plan.alpha && plan.tilted;
  r.gain = plan.factor * (alpha ? exp_of(r.log_r) / plan.order : 1);
  if (alpha)
    r.value = near_one(r.R) ? r.F : expm1_of(r.log_r) / (plan.order * (plan.order - 1));
  else
    r.value = plan.tilted ? r.log_r / (plan.order - 1) : r.F;
  r.value *= plan.factor;
  return r;
}

// The mixture family, after its second sweep. TVD is what one has more, or the other; of the two sums the one
// over less of the other distribution, by whose weight it is in error where x is.
template <class Crew = Alone>
KD_HD void close_mixed(const Part *parts, int n, const Plan &plan, Row &r, const Crew &crew = {}) {
  double sums[4]{};
  crew.sum(n, sums, [&](int i, double (&sum)[4]) {
    const Part &p = parts[i];
    if (p.empty()) return;
    sum[0] += p.unit * p.terms;
    sum[1] += p.unit * p.moved;
    sum[2] += p.unit * p.lacks;
    sum[3] += p.unit * p.excess;
  });
  r.value = larger(plan.tvd && sums[3] + sums[0] > .5 ? sums[2] : sums[0], 0.);
  r.moved = sums[1];
  r.above = sums[3] + sums[0];
  r.lost |= !std::isfinite(r.value) || !std::isfinite(r.moved);
}

// What step_kept leaves for the end of a block, from its s and t. gap: sum eo - e.
KD_HD void close_kept(Second how, const Mixed<double> &mix, double s, double t, double gap, Part &p) {
  if (how == kOfBase) {
    p.terms = mix.c_base * s;
    return;
  }
  const double of_base = mix.l * gap - s * kLn2, of_other = t * kLn2 - mix.co_l * gap;
  p.terms = mix.c_base * of_base + mix.c_other * of_other;
  if (how == kOfOther) return;  // else M's terms are these
  p.moved = mix.student_base ? (how == kReverse ? -mix.c_other * gap : -mix.c_base * s * kLn2)
                             : mix.c_other * t * kLn2;
}

// T dD/dz = A em + B et + C e over a block, times scale; q (A xi + C) in the mixture family.
KD_HD Coefficients coefficients(const Part &p, const Row &r, const Plan &plan, double scale) {
  if (p.empty()) return {0, 0, 0};
  if (plan.mixed) return {p.unit * scale, 0, -p.unit * scale * r.moved, -p.unit * scale * r.above};
  const double unit = p.unit * scale * r.gain, h = r.shift - p.offset;
  const double A = unit * exp_of(-h), C = unit * expm1_of(-h);
  if (!plan.tilted) return {A, 0, C};
  const double bh = plan.tilt * h, B = -unit * exp_of(-bh - r.log_r), less = unit * expm1_of(-bh - r.log_r);
  if (plan.student_base) return {0, B, -less};
  return {A, B, C - less};
}

// Log-sum-exps and entropies of a row that is closed. logs: of its parts, StatParts or what begins like them.
// The base's entropy, sum p (log total - log e), has its own digits also where one class has nearly all of p:
// log total is log1p of the others.
template <class Logs, class Crew = Alone>
KD_HD Shapes shapes_of(const Part *parts, const Logs *logs, int n, const Row &r, const Plan &plan,
                       const Crew &crew = {}) {
  const double log_total = log_of(r.total);
  const int highest = crew.first(n, [&](int i) { return parts[i].s > 0 ? parts[i].top : -INFINITY; });
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
  return plan.student_base ? Shapes{base, other, sums[0], sums[1]} : Shapes{other, base, sums[1], sums[0]};
}
KD_HD bool broken(const Shapes &s) { return !(s.lse_z - s.lse_z == 0) || !(s.lse_v - s.lse_v == 0); }

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

// The hard term of kd_call, from the parts of a row.
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
KD_HD double cross_entropy_of(const HardRow &h) { return log1p_of(h.rest) + (h.top - h.label); }
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

}  // namespace KD_LEVEL
}  // namespace kd

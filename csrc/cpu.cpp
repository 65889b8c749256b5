// The CPU library. This file is compiled once for each instruction-set level (KD_ISA = v2, v3, v4 on x86-64, base elsewhere) and once
// more without KD_ISA for the C functions, which ask the processor at run time which level to call.
//
// A row goes through three phases, each over its blocks of classes, which stay in the first-level cache:
//     sweep   one read of both rows: sums of the block, and its e, em, et (row.h) into the workspace
//     close   the blocks are merged in order: the value, and three coefficients for each block
//     emit    the gradient as a linear combination of what was kept, written past the caches
// The teacher's gradient, where there is one, is emitted from the same sweeps (MirrorJob) before the student's.
// Logits with a transform are transformed as a block is fetched; what a softcap and label smoothing do to a gradient class by class comes
// between close and emit. Rows of the mixture family are swept twice, from the second-level cache, and the second sweep is what is kept.
// The workspace is the tail of the gradient itself, whose rows are written last: no memory is asked for beyond the gradient. Blocks
// that find no room are swept again before they are emitted, with the same bits. Threads take rows, or, where there are fewer rows
// than threads, blocks of one row.
#include "api.h"

#if defined(KD_ISA)

#define KD_CONCAT_(a, b) a##b
#define KD_CONCAT(a, b) KD_CONCAT_(a, b)
#define KD_LEVEL KD_CONCAT(level_, KD_ISA)

#include <cstdlib>
#include <optional>
#include <type_traits>
#include "careful.h"
#include "modifiers.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kd {
namespace KD_LEVEL {
namespace {

static_assert(KD_BF16 == int(DtypeCode::kBF16) && KD_F16 == int(DtypeCode::kF16) && KD_F32 == int(DtypeCode::kF32) && KD_F64 == int(DtypeCode::kF64), "");

constexpr int64_t kBlockBytes = 16384;               // of Reals: a block of both rows fits the first-level cache
constexpr int kLost = 3;                             // a block that only careful.h can take
template <class Real> constexpr int64_t kBlock = kBlockBytes / sizeof(Real);
template <class Real> constexpr Real kReach = sizeof(Real) == 4 ? 43 : 430;   // nothing within it over- or underflows: 2^43 2^-125

KD_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KD_HD int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
KD_HD int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
constexpr int kKept = 6;                             // what a block keeps (RowJob::slots)
template <class Real> constexpr int64_t kSlot = kBlock<Real> + 64 / sizeof(Real);   // one kept array of a block; a vector may be read past its end

template <class Real> KD_HD double sum_of(typename Vec<Real>::D x) {
  double s = 0;
  for (int i = 0; i < Vec<Real>::W; i++) s += x[i];
  return s;
}

template <class Real> KD_HD Real largest_lane(typename Vec<Real>::F x) {
  Real top = x[0];
  for (int i = 1; i < Vec<Real>::W; i++) top = larger(x[i], top);
  return top;
}

// ---------------------------------------------------------------- sweeping a block
// S is what a row is stored as: Real, or a 16-bit float that is widened as it is loaded.
template <class Real, class S> Real element(const S *x, int64_t i) {
  Real r;
  copy_row(x + i, 1, &r);
  return r;
}

template <class Real, class S> Real largest(const S *x, int64_t n) {
  if constexpr (std::is_same<S, bf16>::value) return largest_half((const uint16_t *)x, n, half_value<bf16>, 0xff80);
  if constexpr (std::is_same<S, f16>::value) return largest_half((const uint16_t *)x, n, half_value<f16>, 0xfc00);
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  F a = splat<F>(-INFINITY), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) { a = larger(load_as<F>(x + i), a); b = larger(load_as<F>(x + i + W), b); }
  Real top = largest_lane<Real>(larger(a, b));
  for (; i < n; i++) top = larger(element<Real>(x, i), top);
  return top;
}

template <class Real, class S> int64_t find(const S *x, int64_t n, Real value) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    const auto at = [&](int64_t j) { return load_as<F>(x + j) == value; };
    const auto hit = at(i) | at(i + W) | at(i + 2 * W) | at(i + 3 * W);
    int64_t found = 0;
    for (int j = 0; j < W; j++) found |= hit[j];
    if (found) break;
  }
  while (i < n && !(element<Real>(x, i) == value)) i++;
  return i;
}

// Where a block's differences are measured from: near their mean under b, so that what is summed is as small as what is wanted. The
// mean is estimated from 64 classes spread over the block and the largest one, which alone decides where it dominates.
template <class Real, class S> void find_references(const S *b, const S *o, int64_t n, double k, Part &p) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W, kVectors = 64 / W;
  const Real top = largest<Real>(b, n);
  const auto difference_at = [&](int64_t i) { return double(element<Real>(o, i)) - double(element<Real>(b, i)); };
  p.top = top;
  if (top == -INFINITY) {                            // no class of the base here: what the other has is measured from its own largest
    p.top = largest<Real>(o, n); p.ref = 0;
  } else if (std::isfinite(top)) {
    p.ref = difference_at(find(b, n, top));
    for (int64_t j = 0; j < n && !std::isfinite(p.ref); j++) p.ref = difference_at(j);
    if (!std::isfinite(p.ref)) p.ref = 0;
    if (n < 256) return;
    const Real at = Real(p.ref), c = Real(k * kLog2e);
    F weight{}, mean{};
    for (int i = 0; i < kVectors; i++) {
      const int64_t j = (n - W) / kVectors * i;
      const F vb = load_as<F>(b + j), x = (load_as<F>(o + j) - vb) - at, a = (vb - top) * c;
      const F w = select(x - x == Real(0), exp2_of_product(a, Real(1), Exp2<Real>::kFloor), F{});
      weight += w; mean += select(w > Real(0), w * x, F{});
    }
    double w = 0, m = 0;
    for (int j = 0; j < W; j++) { w += weight[j]; m += mean[j]; }
    const double each = n / 64.;                     // classes that one of the sample stands for
    p.ref = Real(p.ref + each * m / (1 + each * w));
  }
}

// Sums are formed in vectors of Real over at most 64 terms a lane, then in fp64.
template <class Real> struct Accumulator {
  using F = typename Vec<Real>::F;
  using I = typename Vec<Real>::I;
  using D = typename Vec<Real>::D;
  D s{}, d{}, k1{}, k2{}, t{}, n{}, ties{}, log_b{}, log_o{};
  I wild{};
  template <Shape kShape, bool kStats = false> KD_HD void add(Sums<F> &x, I &w) {
    if (kStats) { log_b += __builtin_convertvector(x.log_b, D); log_o += __builtin_convertvector(x.log_o, D); }
    s += __builtin_convertvector(x.s, D); d += __builtin_convertvector(x.d, D); k1 += __builtin_convertvector(x.k1, D);
    if (kShape == kTilted) { k2 += __builtin_convertvector(x.k2, D); t += __builtin_convertvector(x.t, D); }
    if (kShape == kEntropy) { n += __builtin_convertvector(x.n, D); ties += __builtin_convertvector(x.ties, D); }
    wild = w > wild ? w : wild;
    x = Sums<F>{}; w = I{};
  }
  Real reach() const {
    auto worst = wild[0];
    for (int j = 1; j < Vec<Real>::W; j++) worst = wild[j] > worst ? wild[j] : worst;
    return from_bits(worst);
  }
};

// step over the block's vectors; the last, partial one is filled up with masked classes. kAhead: the next block is asked for meanwhile.
template <class Real, bool kAhead = true, class S, class Full, class Last, class Flush>
KD_HD void each_vector(const S *b, const S *o, int64_t n, Full full, Last last, Flush flush) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  const int64_t whole = n / W * W;
  for (int64_t i0 = 0; i0 < whole; i0 += 64 * W) {
    const int64_t end = smaller(i0 + 64 * W, whole);
    for (int64_t i = i0; i < end; i += W) {
      if (kAhead) { __builtin_prefetch(o + i + kBlock<Real>); __builtin_prefetch(b + i + kBlock<Real>); }
      full(i, load_as<F>(b + i), load_as<F>(o + i));
    }
    flush();
  }
  if (whole < n) {
    Real tb[W], to[W];
    for (int j = 0; j < W; j++) tb[j] = to[j] = -INFINITY;
    copy_row(b + whole, n - whole, tb); copy_row(o + whole, n - whole, to);
    last(whole, load<F>(tb), load<F>(to));
    flush();
  }
}

template <class Real> References<Real> references(const Plan &plan, double top, double at, bool carry, Real reach) {
  const Real ref = Real(at), c = Real(plan.c);
  return {Real(top), ref, carry ? Real(at - ref) : 0, c, plan.exact ? Real(plan.c_low) : 0, Real(plan.tilt), Exp2<Real>::kFloor / c, reach, !plan.student_base};
}

template <Shape kShape, Care kCare, bool kStats, class Real, class S>
void sweep(const S *b, const S *o, int64_t n, const Plan &plan, StatPart *stats, Real *const *keep, Part &p, Real reach) {
  using F = typename Vec<Real>::F;
  using I = typename Vec<Real>::I;
  constexpr bool kCarry = kCare != kFast;
  constexpr Logs kLogs = !kStats ? kNoLogs : kCare == kMasked ? kBothLogs : kBriefLogs;
  const References<Real> r = references(plan, p.top, p.ref, kCarry, reach);
  Real *const e = keep[0], *const em = keep[1], *const et = keep[2];
  Accumulator<Real> total;
  Sums<F> s;
  I wild{};
  F top_o = splat<F>(-INFINITY);
  I lone{};
  const auto put = [&](int64_t i, F vb, F vo, const Kept<F> &k) __attribute__((always_inline)) {
    if (kStats) top_o = larger(vo, top_o);
    if (kCare == kMasked) lone |= (vb == Real(-INFINITY)) ^ (vo == Real(-INFINITY));
    store(e + i, k.e);
    if (em) store(em + i, k.em);
    if (kShape == kTilted) store(et + i, k.et);
  };
  each_vector<Real>(b, o, n,
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) { put(i, vb, vo, step<kShape, kCarry, kCare == kMasked, kLogs>(vb, vo, r, s, wild)); },
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) {
        put(i, vb, vo, step<kShape, kCarry, true, kLogs>(vb, vo, r, s, wild));
        if (kCare != kMasked) wild = (vb == Real(-INFINITY)) ^ (vo == Real(-INFINITY)) ? I{} + Exp2<Real>::kAbs : wild;   // for kMasked
      },
      [&]() __attribute__((always_inline)) { total.template add<kShape, kStats>(s, wild); });
  p.s = sum_of<Real>(total.s); p.d = sum_of<Real>(total.d); p.k1 = sum_of<Real>(total.k1);
  p.offset = plan.k * (double(r.ref) + r.ref_low);
  p.k2 = sum_of<Real>(total.k2); p.t = sum_of<Real>(total.t);
  if (kStats) {
    stats->log_b = sum_of<Real>(total.log_b) * plan.k; stats->log_o = sum_of<Real>(total.log_o) * plan.k; stats->top_o = largest_lane<Real>(top_o);
    if (kLogs == kBriefLogs) stats->log_o = other_log(p, stats->log_b, stats->log_o);
  }
  if (kShape == kEntropy) {
    const double ties = sum_of<Real>(total.ties);
    p.rest = p.s + (ties > 0 ? ties - 1 : 0); p.s += ties; p.n = sum_of<Real>(total.n) * kLn2;
  }
  p.care = total.reach() <= reach ? int(kCare) : kLost;
  p.lone = !none_of(lone);
}

// Where the second sweep measures from: the row's own shift, put so that a reference of the first that was right stays as it is.
template <class Real> struct Moved {
  double missing;                     // what the first sweep's references lacked
  Real rest;                          // what these lack, in base 2
  References<Real> r;
  Moved(const Plan &plan, const Part &p, double shift, bool carry) : missing(shift - p.offset) {
    const References<Real> first = references<Real>(plan, p.top, p.ref, p.care != kFast, 0);
    const double before = double(first.ref) + first.ref_low;
    r = references(plan, p.top, before + missing / plan.k, carry, kReach<Real>);
    rest = Real((missing - plan.k * ((double(r.ref) + r.ref_low) - before)) * kLog2e);
  }
};

// The second sweep of the mixture family, from the row's own shift and from what the first has kept: e and e^y - 1.
template <Care kCare, Second kHow, class Real, class S>
void sweep_mixed(const S *b, const S *o, int64_t n, const Plan &plan, const Mixed<Real> &member, double shift, Real *const *keep, Part &p) {
  const Mixed<Real> mix = member;                    // ours: no store can change it
  Real *const kept_e = keep[0], *const kept_m = keep[1], *const out_q = keep[4], *const out_xi = keep[5];
  using F = typename Vec<Real>::F;
  using I = typename Vec<Real>::I;
  constexpr bool kCarry = kCare != kFast;
  const Moved<Real> m(plan, p, shift, kCarry);
  const double back = std::exp(-m.missing), back_1 = std::expm1(-m.missing);
  const Real rest = m.rest, less = Real(back), less_1 = Real(back_1);
  const References<Real> r = m.r;
  Accumulator<Real> total;
  Sums<F> s;
  I wild{}, unseen{};
  const auto put = [&](int64_t i, F vb, F vo, auto last) __attribute__((always_inline)) {
    constexpr bool kLast = decltype(last)::value, kMask = kHow == kByClass && (kLast || kCare == kMasked);
    const F e = load<F>(kept_e + i), share = load<F>(kept_m + i) * less + less_1;
    Kept<F> k;
    if constexpr (kHow == kByClass) k = step_mixed<kCarry, kMask>(vb, vo, r, mix, rest, e, e + e * share, s, kMask || kCarry ? wild : unseen);
    else k = step_kept<kHow, kLast>(vb, vo, r, mix, rest, e, share, s);
    if (kMask || !mix.student_base) store(out_q + i, k.e);   // else it is e
    store(out_xi + i, k.em);
  };
  each_vector<Real, false>(b, o, n,
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) { put(i, vb, vo, std::false_type{}); },
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) { put(i, vb, vo, std::true_type{}); },
      [&]() __attribute__((always_inline)) { total.template add<kTilted>(s, wild); });
  p.moved = sum_of<Real>(total.d); p.terms = sum_of<Real>(total.k1);
  p.lacks = sum_of<Real>(total.k2); p.excess = sum_of<Real>(total.t);
  if (kHow > kTvdGap) close_kept(kHow, plan.mixture, sum_of<Real>(total.s), p.excess, back * p.d + back_1 * p.s, p);
  if (!(total.reach() <= r.reach)) p.care = kLost;
}

// Of kLogRatio: y as the first sweep has it, for the cross entropy with the block's log b.
template <bool kCarry, class Real, class S>
void sweep_log_ratio(const S *b, const S *o, int64_t n, const Plan &plan, Real *const *keep, const Part &p) {
  using F = typename Vec<Real>::F;
  const References<Real> r = references<Real>(plan, p.top, p.ref, kCarry, 0);
  const Real *const e = keep[0];
  Real *const out = keep[5];
  const auto put = [&](int64_t i, F vb, F vo) __attribute__((always_inline)) {
    const F y = deviation<kCarry>(vb, vo, r, Real(0)), all = plan.entropy ? y + (vb - r.top) * r.c : y;
    store(out + i, select(load<F>(e + i) > F{}, all, F{}));   // a masked class has no y
  };
  each_vector<Real, false>(b, o, n, put, put, [] {});
}

template <class Real, class S>
void sweep_mixed(const S *b, const S *o, int64_t n, const Plan &plan, const Mixed<Real> &mix, const Row &row, Real *const *keep, Part &p, Real *wide_b, Real *wide_o) {
  if (plan.mirror == kLogRatio) return p.care == kFast ? sweep_log_ratio<false>(b, o, n, plan, keep, p) : sweep_log_ratio<true>(b, o, n, plan, keep, p);
  // the first sweep has seen that y is within reach of its own references, which is enough for those that are not far from them
  if (p.care == kFast && std::fabs(row.shift - p.offset) < 13) {
    const auto with = [&](auto how) { sweep_mixed<kFast, decltype(how)::value>(b, o, n, plan, mix, row.shift, keep, p); };
    switch (second_of(plan, row.F)) {
      case kByClass: return with(std::integral_constant<Second, kByClass>{});
      case kTvdGap: return with(std::integral_constant<Second, kTvdGap>{});
      case kReverse: return with(std::integral_constant<Second, kReverse>{});
      case kOfBase: return with(std::integral_constant<Second, kOfBase>{});
      case kOfOther: return with(std::integral_constant<Second, kOfOther>{});
      case kJoint: return with(std::integral_constant<Second, kJoint>{});
    }
  }
  if constexpr (Half<S>::value) {
    copy_row(b, n, wide_b); copy_row(o, n, wide_o);
    sweep_mixed(wide_b, wide_o, n, plan, mix, row, keep, p, wide_b, wide_o);
  } else if (p.care == kExact) {
    sweep_mixed<kExact, kByClass>(b, o, n, plan, mix, row.shift, keep, p);
  } else {
    sweep_mixed<kMasked, kByClass>(b, o, n, plan, mix, row.shift, keep, p);
  }
}

template <bool kMask, class Real> void sweep_moments(const Real *b, const Real *o, int64_t n, Real *const *keep, Part &p) {
  using F = typename Vec<Real>::F;
  using I = typename Vec<Real>::I;
  Accumulator<Real> total;
  Sums<F> s;
  I wild{};
  const Real ref = Real(p.ref), low = Real(p.ref - ref);
  const auto put = [&](int64_t i, const Kept<F> &k) __attribute__((always_inline)) { store(keep[0] + i, k.e); store(keep[1] + i, k.em); };
  each_vector<Real>(b, o, n,
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) { put(i, step_moments<kMask>(vb, vo, ref, low, s, wild)); },
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) { put(i, step_moments<true>(vb, vo, ref, low, s, wild)); },
      [&]() __attribute__((always_inline)) { total.template add<kPlain>(s, wild); });
  p.s = sum_of<Real>(total.s); p.d = sum_of<Real>(total.d); p.k1 = sum_of<Real>(total.k1);
  p.offset = double(ref) + low;
  p.care = std::isfinite(total.reach()) ? (kMask ? kMasked : kExact) : kLost;
}

template <class Real, class S>
void sweep(int care, const S *b, const S *o, int64_t n, const Plan &plan, StatPart *stats, Real *const *keep, Part &p, Real *wide_b, Real *wide_o) {
  if constexpr (Half<S>::value) if (care != kFast) {   // the careful forms exist for Real alone
    copy_row(b, n, wide_b); copy_row(o, n, wide_o);
    return sweep(care, wide_b, wide_o, n, plan, stats, keep, p, wide_b, wide_o);
  }
  const Real reach = kReach<Real> / Real(larger(1., std::fabs(plan.tilt)));
  const auto with_both = [&](auto shape, auto with_stats) {
    constexpr Shape kShape = decltype(shape)::value;
    constexpr bool kStats = decltype(with_stats)::value;
    if constexpr (!Half<S>::value) {
      if (care == kExact) return sweep<kShape, kExact, kStats>(b, o, n, plan, stats, keep, p, reach);
      if (care == kMasked) return sweep<kShape, kMasked, kStats>(b, o, n, plan, stats, keep, p, reach);
    }
    sweep<kShape, kFast, kStats>(b, o, n, plan, stats, keep, p, reach);
  };
  const auto with = [&](auto shape) { if (stats) with_both(shape, std::true_type{}); else with_both(shape, std::false_type{}); };
  if (plan.moments) {
    if constexpr (!Half<S>::value) return care == kMasked ? sweep_moments<true>(b, o, n, keep, p) : sweep_moments<false>(b, o, n, keep, p);
  } else if (plan.tilted) {
    with(std::integral_constant<Shape, kTilted>{});
  } else if (plan.mixed) {
    with(std::integral_constant<Shape, kMixed>{});
  } else if (plan.entropy) {
    with(std::integral_constant<Shape, kEntropy>{});
  } else {
    with(std::integral_constant<Shape, kPlain>{});
  }
}

// A block from its logits: references (unless the row has given its own), then as much care as it turns out to need.
template <class Real, class S>
void measure_block(const S *b, const S *o, int64_t n, const Plan &plan, StatPart *stats, const double *ref, Real *const *keep, Part &p, Real *wide_b, Real *wide_o) {
  p = Part();
  if (stats) { *stats = StatPart(); if (plan.moments) stats->top_o = largest<Real>(o, n); }
  find_references<Real>(b, o, n, plan.moments ? 0 : plan.k, p);
  if (ref) p.ref = *ref;
  if (p.top == -INFINITY) {                          // no class at all, unless a nan hides there
    for (int64_t i = 0; i < n; i++) if (element<Real>(b, i) != element<Real>(b, i) || element<Real>(o, i) != element<Real>(o, i)) p.care = kLost;
    return;
  }
  if (!std::isfinite(p.top)) { p.care = kLost; return; }
  sweep(plan.moments || (plan.exact && !Half<S>::value) ? kExact : kFast, b, o, n, plan, stats, keep, p, wide_b, wide_o);
  if (p.care == kLost) return sweep(kMasked, b, o, n, plan, stats, keep, p, wide_b, wide_o);
  // brief logs cancel where the references were far off and little of the other is left
  if (stats && !plan.moments && p.s + p.d < .25 * p.s) {
    sweep(kMasked, b, o, n, plan, stats, keep, p, wide_b, wide_o);
    if (p.care == kMasked) p.care = kExact;          // which is the same without masks
    return;
  }
  // The rounding of o - b, 2^-24 of the offset, must stay under 1e-6 of the differences that remain; 16-bit logits have none.
  if (Half<S>::value || p.care != kFast) return;
  const double d = p.d / p.s, own = p.k1 / p.s - (d - std::log1p(d)), off = plan.k * p.ref;
  if (off * off > 512 * own) sweep(kExact, b, o, n, plan, stats, keep, p, wide_b, wide_o);
}

template <bool kSmooth, class Real, class S> SmoothPart sweep_hard(const S *z, int64_t n, Real *e1) {
  using F = typename Vec<Real>::F;
  using D = typename Vec<Real>::D;
  SmoothPart p;
  const Real top = largest<Real>(z, n);
  p.top = top;
  if (!(std::fabs(p.top) < INFINITY)) {
    std::memset(e1, 0, round_up(n, Vec<Real>::W) * sizeof(Real));
    return p;
  }
  D rest{}, ties{}, below{}, count{};
  F r{}, t{}, b{}, c{};
  const auto full = [&](int64_t i, F vz, F) __attribute__((always_inline)) {
    store(e1 + i, step_hard(vz, top, r, t));
    if (kSmooth) { const auto there = vz > Real(-INFINITY); b += select(there, top - vz, F{}); c += select(there, splat<F>(1), F{}); }
  };
  each_vector<Real>(z, z, n, full, full, [&]() __attribute__((always_inline)) {
    rest += __builtin_convertvector(r, D); ties += __builtin_convertvector(t, D);
    r = F{}; t = F{};
    if (kSmooth) { below += __builtin_convertvector(b, D); count += __builtin_convertvector(c, D); b = F{}; c = F{}; }
  });
  p.below = sum_of<Real>(below); p.count = sum_of<Real>(count);
  p.rest = sum_of<Real>(rest) + (sum_of<Real>(ties) - 1);
  p.s = 1 + p.rest;
  return p;
}

// ---------------------------------------------------------------- emitting a block: sum_j factor[j] * kept[j]
// mixed: the second of them is times the first, so that what is subtracted has not been rounded yet.
template <int kArrays, bool kMixed, class Real>
void emit(const Real *const *kept, const double *factors, void *out, int32_t dtype, int64_t i, int64_t n, bool streaming) {
  using F = typename Vec<Real>::F;
  const Real *rows[kArrays];
  Real factor[kArrays];
  for (int j = 0; j < kArrays; j++) { rows[j] = kept[j]; factor[j] = Real(factors[j]); }
  store_row(out, dtype, i, n, streaming, Real(0), [=](int64_t l) __attribute__((always_inline)) {
    F g = load<F>(rows[0] + l);
    if (kMixed) g *= load<F>(rows[1] + l) * factor[1] + factor[0];
    else g *= factor[0];
    for (int j = kMixed ? 2 : 1; j < kArrays; j++) g += load<F>(rows[j] + l) * factor[j];
    return g;
  });
}

template <class Real>
void emit(int arrays, bool mixed, const Real *const *kept, const double *factors, void *out, int32_t dtype, int64_t i, int64_t n, bool streaming) {
  if (mixed && arrays == 2) emit<2, true>(kept, factors, out, dtype, i, n, streaming);
  else if (mixed) emit<3, true>(kept, factors, out, dtype, i, n, streaming);
  else if (arrays == 1) emit<1, false>(kept, factors, out, dtype, i, n, streaming);
  else if (arrays == 2) emit<2, false>(kept, factors, out, dtype, i, n, streaming);
  else if (arrays == 3) emit<3, false>(kept, factors, out, dtype, i, n, streaming);
  else emit<4, false>(kept, factors, out, dtype, i, n, streaming);
}

// ---------------------------------------------------------------- rows
// What careful.h asks of the lanes of a vector.
struct Lanes {
  double sum(VD x) const { double s = 0; for (int i = 0; i < Vec<double>::W; i++) s += x[i]; return s; }
  double largest(VD x) const { double s = x[0]; for (int i = 1; i < Vec<double>::W; i++) s = x[i] > s ? x[i] : s; return s; }
  bool any(VL x) const { int64_t s = 0; for (int i = 0; i < Vec<double>::W; i++) s |= x[i]; return s != 0; }
};

KD_HD const char *at(const void *p, int32_t dtype, const int64_t *stride, const kd_call &c, int64_t row) {
  return (const char *)p + (row / c.inner * stride[0] + row % c.inner * stride[1]) * element_size(dtype);
}

// What one thread works with: room for a block, and its share of the workspace.
template <class Real> struct Desk {
  alignas(64) Real b[kSlot<Real>], o[kSlot<Real>], slot[5 * kSlot<Real>], g[kSlot<Real>];
  Real *workspace = nullptr;
  int64_t capacity = 0;                              // blocks that fit the workspace
};

template <class Real> class RowJob {
 public:
  // paired: with a mirror, or a mirror; first: the job whose sweeps a mirror goes on from
  RowJob(const kd_call &c, const Plan &p, bool paired = false, const RowJob *first = nullptr)
      : c_(c), plan_(p), first_(first), paired_(paired), of_student_(c.student_scale, c.student_softcap), of_teacher_(c.teacher_scale, c.teacher_softcap),
        blocks_((c.vocab + kBlock<Real> - 1) / kBlock<Real>) {
    if (p.mixed) mix_ = narrowed(p.mixture, Real());
    third_ = p.tilted && (paired || !p.student_base);
    arrays_ = first ? first->arrays_ : 2 + third_ + outputs() + hard();
    size_ = element_size(c.student_dtype);
    const double unit = by_class() ? 1 : c.student_scale;
    grad_scale_ = c.grad_scale * unit; hard_grad_scale_ = c.hard_grad_scale * unit;
  }
  int64_t blocks() const { return blocks_; }
  bool mixed() const { return plan_.mixed && plan_.mirror != kDifference; }
  int64_t slot_bytes() const { return arrays_ * kSlot<Real> * sizeof(Real); }
  bool hard() const { return c_.labels && (c_.hard_scale != 0 || c_.hard_grad_scale != 0); }

  // Whether each class of the gradient has a factor and a summand of its own.
  bool by_class() const { return of_student_.softcap > 0 || smooth(); }
  bool smooth() const { return hard() && c_.label_smoothing != 0; }

  // kept: whether the workspace holds what the first sweep has left
  struct State { Part *parts; SmoothPart *hard_parts; StatPart *stat_parts; Row row; HardRow hard; double weight; bool kept = true; };

  bool begin(State &s, int64_t row) const {          // false: the row counts for nothing
    s.weight = c_.weight ? c_.weight[row] : 1;
    if (s.weight != 0) return true;
    if (c_.loss) c_.loss[row] = 0;
    if (c_.grad) std::memset(grad(row), 0, c_.grad_width * size_);
    if (c_.stats) for (int i = 0; i < KD_STATS; i++) c_.stats[row * KD_STATS + i] = NAN;
    return false;
  }

  void sweep_blocks(State &s, int64_t row, int64_t lo, int64_t hi, Desk<Real> &desk) const {
    const double ref = plan_.moments ? s.row.shift : s.row.shift / plan_.k;
    bool lost = false;
    for (int64_t i = lo; i < hi && !lost; i++) {     // once the row is lost, nothing that follows is used
      const int64_t n = length(i);
      Real *keep[kKept];
      slots(desk, i, lo, keep);
      with_block(row, i, desk, [&](auto *z, auto *b, auto *o) {
        if (hard()) s.hard_parts[i] = hard_block(z, n, keep[3]);
        if (plan_.careful) return;
        measure_block(b, o, n, plan_, c_.stats ? s.stat_parts + i : nullptr, s.row.refine ? &ref : nullptr, keep, s.parts[i], desk.b, desk.o);
        lost = s.parts[i].care == kLost;
      });
    }
  }

  void close(State &s, int64_t row, Desk<Real> &desk) const {
    bool lost = plan_.careful;
    for (int64_t i = 0; i < blocks_ && !lost; i++) lost = s.parts[i].care == kLost;
    const bool again = s.row.refine;
    s.row = Row();
    if (!lost) s.row = close_row(s.parts, int(blocks_), plan_);
    if (again) s.row.refine = false;
    s.row.lost |= lost;
    if (!s.row.lost && !s.row.refine && !plan_.mixed) finish(s, row, s.row.value, desk, nullptr);
  }

  // Of a mirror: whether what the other job has of a row is enough for the gradient.
  bool goes_on(const State &first) const {
    if (plan_.mirror == kNoMirror || first.row.lost) return false;
    for (int64_t i = 0; i < blocks_ && plan_.tilted; i++) if (first.parts[i].lone) return false;
    return true;
  }

  // The second sweep of the mixture family, backwards, as the last block is still on the desk; and its close.
  void mix_blocks(State &s, int64_t row, int64_t lo, int64_t hi, Desk<Real> &desk) const {
    for (int64_t i = hi - 1; i >= lo; i--) {
      Real *keep[kKept];
      slots(desk, i, lo, keep);
      with_block(row, i, desk, [&](auto *z, auto *b, auto *o) { mix_block(s, s.parts[i], i, kept(s, i, lo, desk) || i == hi - 1, z, b, o, keep, desk); });
    }
  }
  void close_mixed_row(State &s, int64_t row, Desk<Real> &desk) const {
    for (int64_t i = 0; i < blocks_; i++) s.row.lost |= s.parts[i].care == kLost;
    if (!s.row.lost) close_mixed(s.parts, int(blocks_), plan_, s.row);
    if (!s.row.lost) finish(s, row, s.row.value, desk, nullptr);
  }

  void emit_blocks(const State &s, int64_t row, int64_t lo, int64_t hi, Desk<Real> &desk, bool streaming) const {
    // from the block that was swept last, which is still on the desk; the first job of a pair from the one that its mirror came to last, for the caches
    const bool up = sweeps().mixed != (paired_ && !first_);
    for (int64_t turn = lo; turn < hi; turn++) {
      const int64_t i = up ? turn : lo + hi - 1 - turn, n = length(i);
      Real *keep[kKept];
      slots(desk, i, lo, keep);
      const bool there = kept(s, i, lo, desk), kept_here = there || (!paired_ && turn == lo), hard_kept = there || (!paired_ && i == hi - 1);
      const bool again = mixed() && (first_ || !kept_here);
      if (again || !kept_here || (hard() && !hard_kept)) {
        with_block(row, i, desk, [&](auto *z, auto *b, auto *o) {
          Part p = s.parts[i];
          if (hard()) hard_block(z, n, keep[3]);
          if (again) mix_block(s, p, i, kept_here && first_, z, b, o, keep, desk);
          else if (!kept_here && !p.empty()) sweep(p.care, b, o, n, sweeps(), nullptr, keep, p, desk.b, desk.o);
        });
      }
      if (s.parts[i].empty()) for (int j : {0, 1, 2, 4, 5}) if (keep[j]) std::memset(keep[j], 0, kSlot<Real> * sizeof(Real));
      const double scale = s.weight * grad_scale_;
      const Coefficients k = first_ ? mirror_coefficients(s.parts[i], s.row, first_->plan_, plan_, scale) : coefficients(s.parts[i], s.row, plan_, scale);
      if (plan_.student_base && plan_.tilted && s.parts[i].lone) separate_lone(keep[0], keep[2], n, k);
      const Real *kept[4] = {mixed() ? keep[4] : keep[0]};
      double factors[4] = {k.C};
      int m = 1;
      if (keep[1] && !(plan_.tilted && plan_.student_base)) { kept[m] = mixed() ? keep[5] : keep[1]; factors[m++] = k.A; }
      if (keep[2]) { kept[m] = keep[2]; factors[m++] = k.B; }
      write(s, row, i, n, m, kept, factors, keep[3], desk, streaming);
    }
  }

  // A row that the sweep could not take, whole.
  void careful_row(State &s, int64_t row, Desk<Real> &desk, bool streaming) const {
    constexpr int64_t N = kBlock<double>;
    alignas(64) double z[N], v[N], g[N];
    const Transform<double> of_z(c_.student_scale, c_.student_softcap), of_v(c_.teacher_scale, c_.teacher_softcap);
    const auto fill = [&](int64_t i, int64_t n) {
      load_row(student(row), c_.student_dtype, i, n, z);
      load_row(teacher(row), c_.teacher_dtype, i, n, v);
      if (of_z.any()) transform_row((const double *)z, n, of_z, z);
      if (of_v.any()) transform_row((const double *)v, n, of_v, v);
      const int64_t padded = round_up(n, Vec<double>::W);
      for (int64_t j = n; j < padded; j++) z[j] = v[j] = -INFINITY;
      return padded;
    };
    constexpr int W = Vec<double>::W;
    const Lanes lanes;
    Careful<VD, Lanes> careful(plan_, lanes);
    const auto classes = [&](auto body) {
      for (int64_t i = 0; i < c_.vocab; i += N) {
        const int64_t n = fill(i, smaller(N, c_.vocab - i));
        for (int64_t j = 0; j < n; j += W) body(load<VD>(z + j), load<VD>(v + j));
      }
    };
    const double value = careful.measure(classes);
    if (hard() && !plan_.careful) {                  // the sweep stopped where the row was lost
      for (int64_t i = 0; i < blocks_; i++) {
        with_block(row, i, desk, [&](auto *z, auto *, auto *) { s.hard_parts[i] = hard_block(z, length(i), desk.slot); });
      }
    }
    Shapes shapes{};
    if (c_.stats) shapes = careful.shapes(classes);
    finish(s, row, value, desk, &shapes);
    if (!c_.grad) return;
    const double scale = s.weight * grad_scale_;
    Real *soft = desk.slot, *e1 = desk.slot + kSlot<Real>;
    for (int64_t i = 0; i < blocks_; i++) {
      const int64_t n = length(i), i0 = i * kBlock<Real>;
      if (hard()) with_block(row, i, desk, [&](auto *z, auto *, auto *) { hard_block(z, n, e1); });
      for (int64_t j = 0; j < n; j += N) {
        const int64_t m = smaller(N, n - j);
        const int64_t padded = fill(i0 + j, m);
        for (int64_t l = 0; l < padded; l += W) store(g + l, careful.gradient(load<VD>(z + l), load<VD>(v + l)));
        for (int64_t l = 0; l < m; l++) soft[j + l] = Real(g[l]);
      }
      const Real *kept[4] = {soft};
      double factors[4] = {scale};
      write(s, row, i, n, 1, kept, factors, e1, desk, streaming);
    }
  }

 private:
  // kept: what the first sweep left is where keep says
  template <class S> void mix_block(const State &s, Part &p, int64_t i, bool kept, const S *, const S *b, const S *o, Real *const *keep, Desk<Real> &desk) const {
    if (p.empty()) return;
    Part again = p;
    if (!kept) sweep(p.care, b, o, length(i), sweeps(), nullptr, keep, again, desk.b, desk.o);
    sweep_mixed(b, o, length(i), plan_, mix_, s.row, keep, p, desk.b, desk.o);
  }

  template <class S> SmoothPart hard_block(const S *z, int64_t n, Real *e1) const { return smooth() ? sweep_hard<true>(z, n, e1) : sweep_hard<false>(z, n, e1); }

  // S: R, or what widens to it.
  template <class S, class R> static void transform_row(const S *x, int64_t n, const Transform<R> &t, R *out) {
    using F = typename Vec<R>::F;
    constexpr int W = Vec<R>::W;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      __builtin_prefetch(x + i + kBlock<R>);                                              // the next block
      store(out + i, transformed(load_as<F>(x + i), t));
    }
    R rest[W] = {};
    copy_row(x + i, n - i, rest);
    store(rest, transformed(load<F>(rest), t));
    std::memcpy(out + i, rest, (n - i) * sizeof(R));
  }
  // Classes of a row as Reals: where they lie, or in the buffer.
  const Real *fetch(const char *row, int32_t dtype, const Transform<Real> &t, int64_t i, int64_t n, Real *buffer) const {
    if (element_size(dtype) == sizeof(Real) && !t.any()) return (const Real *)row + i;
    if (!t.any()) load_row(row, dtype, i, n, buffer);
    else if (element_size(dtype) == sizeof(Real)) transform_row((const Real *)row + i, n, t, buffer);
    else if constexpr (sizeof(Real) == 8) { load_row(row, dtype, i, n, buffer); transform_row((const Real *)buffer, n, t, buffer); }
    else if (dtype == KD_BF16) transform_row((const bf16 *)row + i, n, t, buffer);
    else transform_row((const f16 *)row + i, n, t, buffer);
    return buffer;
  }

  const char *student(int64_t row) const { return at(c_.student, c_.student_dtype, c_.student_stride, c_, row); }
  const char *teacher(int64_t row) const { return at(c_.teacher, c_.teacher_dtype, c_.teacher_stride, c_, row); }
  char *grad(int64_t row) const { return (char *)at(c_.grad, c_.student_dtype, c_.grad_stride, c_, row); }
  int64_t length(int64_t block) const { return smaller(kBlock<Real>, c_.vocab - block * kBlock<Real>); }

  // body(student, base, other): the block where it lies if both rows are stored alike, else as Reals on the desk.
  template <class Body> void with_block(int64_t row, int64_t block, Desk<Real> &desk, Body body) const {
    const int64_t i = block * kBlock<Real>, n = length(block);
    const char *z = student(row), *v = teacher(row);
    const auto with = [&](auto *z, auto *v) { body(z, plan_.student_base ? z : v, plan_.student_base ? v : z); };
    if constexpr (sizeof(Real) == 4) if (c_.student_dtype == c_.teacher_dtype && !plan_.moments && !of_student_.any() && !of_teacher_.any()) {
      if (c_.student_dtype == KD_BF16) return with((const bf16 *)z + i, (const bf16 *)v + i);
      if (c_.student_dtype == KD_F16) return with((const f16 *)z + i, (const f16 *)v + i);
    }
    Real *const first = plan_.student_base ? desk.b : desk.o, *const second = plan_.student_base ? desk.o : desk.b;
    with(fetch(z, c_.student_dtype, of_student_, i, n, first), fetch(v, c_.teacher_dtype, of_teacher_, i, n, second));
  }

  const Plan &sweeps() const { return first_ ? first_->plan_ : plan_; }   // what the first sweep is for
  // Arrays of its own for the second sweep of a pair's first job, as the mirror needs what the first sweep left; q is e where the student is the base.
  int outputs() const { return paired_ && plan_.mixed ? 2 - plan_.student_base : 0; }
  bool kept(const State &s, int64_t i, int64_t lo, const Desk<Real> &desk) const { return s.kept && i - lo < desk.capacity; }

  // Where block i keeps e, em, et and the hard term's e1, and its second sweep's q and xi; null for what the family does not need.
  void slots(Desk<Real> &desk, int64_t i, int64_t lo, Real **keep) const {
    Real *p = i - lo < desk.capacity ? desk.workspace + (i - lo) * arrays_ * kSlot<Real> : desk.slot;
    keep[0] = p; p += kSlot<Real>;
    keep[1] = !plan_.tilted || third_ ? p : nullptr; p += keep[1] ? kSlot<Real> : 0;
    keep[2] = plan_.tilted ? p : nullptr; p += keep[2] ? kSlot<Real> : 0;
    keep[4] = keep[0]; keep[5] = keep[1];
    if (paired_ && mixed()) {                        // a mirror's are written at once
      keep[5] = first_ ? desk.slot + 3 * kSlot<Real> : p;
      if (!plan_.student_base) keep[4] = keep[5] + kSlot<Real>;
      p += first_ ? 0 : outputs() * kSlot<Real>;
    }
    keep[3] = p;
  }

  // Classes that the teacher masks have et = -e, and q = (C - B) e as their gradient. Where C and B are much larger than their
  // difference (the supports have little in common), e takes the ratio, so that the two are not subtracted class by class.
  static void separate_lone(Real *e, Real *et, int64_t n, const Coefficients &k) {
    const double q = k.C - k.B;
    if (!(std::fabs(k.C) > std::fabs(q))) return;
    const Real ratio = Real(q / k.C);
    for (int64_t j = 0; j < n; j++) {
      const bool lone = et[j] == -e[j];
      e[j] = lone ? e[j] * ratio : e[j];
      et[j] = lone ? 0 : et[j];
    }
  }

  // shapes: of a row that careful.h has measured
  void finish(State &s, int64_t row, double value, Desk<Real> &desk, const Shapes *shapes) const {
    double loss = c_.value_scale != 0 ? c_.value_scale * value : 0, cross_entropy = NAN;
    if (hard()) {
      Real label;
      label = *fetch(student(row), c_.student_dtype, of_student_, c_.labels[row], 1, &label);
      s.hard = close_hard(c_, int(blocks_), [&](int i) -> const SmoothPart & { return s.hard_parts[i]; }, label);
      cross_entropy = cross_entropy_of(s.hard);
      loss += c_.hard_scale * hard_value(c_, s.hard);
    }
    if (c_.loss) c_.loss[row] = s.weight * loss;
    if (c_.stats) put_stats(s, row, value, cross_entropy, desk, shapes);
  }

  void put_stats(const State &s, int64_t row, double value, double cross_entropy, Desk<Real> &desk, const Shapes *shapes) const {
    const Shapes found = shapes ? *shapes : shapes_of(s.parts, s.stat_parts, int(blocks_), s.row, plan_);
    double *out = c_.stats + row * KD_STATS;
    out[KD_DIVERGENCE] = value; out[KD_CROSS_ENTROPY] = cross_entropy;
    out[KD_STUDENT_LSE] = found.lse_z; out[KD_TEACHER_LSE] = found.lse_v;
    out[KD_STUDENT_ENTROPY] = found.of_z; out[KD_TEACHER_ENTROPY] = found.of_v;
    out[KD_STUDENT_TOP] = broken(found) ? NAN : double(top_class(s, row, true, shapes, desk));
    out[KD_TEACHER_TOP] = broken(found) ? NAN : double(top_class(s, row, false, shapes, desk));
  }

  // The first class with the largest logit: of the block that has it, which a row that was lost has yet to look for.
  int64_t top_class(const State &s, int64_t row, bool of_student, bool lost, Desk<Real> &desk) const {
    const bool base = of_student == plan_.student_base;
    double top = -INFINITY;
    int64_t block = 0, at = 0;
    for (int64_t i = 0; i < blocks_; i++) {
      double t = base ? (s.parts[i].s > 0 ? s.parts[i].top : -INFINITY) : s.stat_parts[i].top_o;
      if (lost) with_block(row, i, desk, [&](auto *, auto *b, auto *o) { t = largest<Real>(base ? b : o, length(i)); });
      if (t > top) { top = t; block = i; }
    }
    with_block(row, block, desk, [&](auto *, auto *b, auto *o) { at = find(base ? b : o, length(block), Real(top)); });
    return block * kBlock<Real> + at;
  }

  void write(const State &s, int64_t row, int64_t block, int64_t n, int m, const Real **kept, double *factors, const Real *e1, Desk<Real> &desk, bool streaming) const {
    const int64_t i0 = block * kBlock<Real>;
    const bool mixed = plan_.mixed && m == 2;        // careful rows come as one array
    char *out = grad(row);
    int64_t label = -1;
    const double scale = s.weight * hard_grad_scale_;
    if (hard()) {
      const bool any = s.hard_parts[block].s > 0;
      kept[m] = e1; factors[m++] = any ? scale * (1 + s.hard.pull) * std::exp(s.hard_parts[block].top - s.hard.top) / s.hard.s : 0;
      label = c_.labels[row] - i0;
      if (label < 0 || label >= n) label = -1;
    }
    // by class: as Reals first
    const bool apart = by_class();
    if (apart) emit(m, mixed, kept, factors, desk.g, sizeof(Real) == 8 ? KD_F64 : KD_F32, 0, n, false);
    else emit(m, mixed, kept, factors, out, c_.student_dtype, i0, n, streaming && label < 0);
    if (label >= 0) {
      double g = mixed ? kept[0][label] * (double(Real(factors[1])) * kept[1][label] + double(Real(factors[0]))) : 0;
      for (int j = mixed ? 2 : 0; j + 1 < m; j++) g += double(Real(factors[j])) * kept[j][label];
      const Real value = Real(g + scale * label_gradient(c_, s.hard));
      if (apart) desk.g[label] = value;
      else store_row(out, c_.student_dtype, label + i0, 1, false, Real(0), [=](int64_t) { return splat<typename Vec<Real>::F>(value); });
    }
    if (apart) put_by_class(row, i0, n, smooth() ? -scale * c_.label_smoothing / s.hard.count : 0, desk, streaming);
    if (block == blocks_ - 1 && c_.grad_width > c_.vocab) std::memset(out + c_.vocab * size_, 0, (c_.grad_width - c_.vocab) * size_);
  }

  // desk.g and what each class of it has besides
  void put_by_class(int64_t row, int64_t i0, int64_t n, double each, Desk<Real> &desk, bool streaming) const {
    using F = typename Vec<Real>::F;
    const Real *z = desk.b, more = Real(each);       // a copy: the row may end where the last vector does not
    const Transform<Real> t = of_student_;
    if (t.any()) fetch(student(row), c_.student_dtype, t, i0, n, desk.b);
    else load_row(student(row), c_.student_dtype, i0, n, desk.b);
    store_row(grad(row), c_.student_dtype, i0, n, streaming, Real(0), [=, &desk](int64_t j) __attribute__((always_inline)) {
      const F at = load<F>(z + j);
      return F((load<F>(desk.g + j) + select(at > Real(-INFINITY), splat<F>(more), F{})) * slope(at, t));
    });
  }

  const kd_call &c_;
  const Plan &plan_;
  const RowJob *const first_;
  const bool paired_;
  const Transform<Real> of_student_, of_teacher_;
  double grad_scale_, hard_grad_scale_;
  Mixed<Real> mix_{};
  const int64_t blocks_;
  int64_t size_;
  int arrays_;
  bool third_;
};

// The teacher's gradient beside the student's: `shared` from the same sweeps, `alone` for the rows for which they are not enough.
template <class Real> struct MirrorJob {
  using State = typename RowJob<Real>::State;
  Plan alone_plan, shared_plan;
  RowJob<Real> shared, alone;
  bool streaming;
  MirrorJob(const kd_call &c, const Plan &plan, const RowJob<Real> &job, bool wide, bool streams)
      : alone_plan(make_plan(c, wide)), shared_plan(make_mirror(plan, alone_plan)), shared(c, shared_plan, true, &job), alone(c, alone_plan),
        streaming(streams) {
    alone_plan.entropy = plan.entropy;               // the cross entropy's, which careful.h knows and the sweep does not
    alone_plan.careful |= plan.entropy;
  }
  // parts: other ones than the first job's, whose workspace is written over (it takes as much or more for a block)
  void run_row(State &first, int64_t row, Desk<Real> &desk, Part *parts) const {
    State s{parts};
    run_alone(alone, s, row, desk, true, streaming);
    first.kept = false;
  }
};

template <class Real> void run_alone(const RowJob<Real> &job, typename RowJob<Real>::State &s, int64_t row, Desk<Real> &desk, bool write, bool streaming,
                                     const MirrorJob<Real> *mirror = nullptr, Part *mirror_parts = nullptr) {
  s.row = Row();
  s.kept = true;
  if (!job.begin(s, row)) {
    typename RowJob<Real>::State m{mirror_parts};
    if (mirror) mirror->alone.begin(m, row);
    return;
  }
  do {
    job.sweep_blocks(s, row, 0, job.blocks(), desk);
    job.close(s, row, desk);
  } while (s.row.refine);
  if (job.mixed() && !s.row.lost) {
    job.mix_blocks(s, row, 0, job.blocks(), desk);
    job.close_mixed_row(s, row, desk);
  }
  if (mirror) {                                      // first, as a gradient in place overwrites the student's logits
    if (mirror->shared.goes_on(s)) mirror->shared.emit_blocks(s, row, 0, job.blocks(), desk, mirror->streaming);
    else mirror->run_row(s, row, desk, mirror_parts);
  }
  if (s.row.lost) job.careful_row(s, row, desk, streaming);
  else if (write) job.emit_blocks(s, row, 0, job.blocks(), desk, streaming);
}

// Of the parallel region we are in, which may have fewer threads than were asked for.
#if defined(_OPENMP)
inline int thread_number() { return omp_get_thread_num(); }
inline int thread_count() { return omp_get_num_threads(); }
#else
inline int thread_number() { return 0; }
inline int thread_count() { return 1; }
#endif

template <class T> T *allocate(int64_t n) { return n > 0 ? (T *)std::malloc(n * sizeof(T)) : nullptr; }

// Whether a gradient goes past the caches; its pages are asked for in few faults then.
inline bool streams(const kd_call &c) {
  const int64_t all = c.rows * c.grad_width * element_size(c.student_dtype);
  if (!c.grad || !c.fresh || all <= (int64_t(8) << 20)) return false;
#if defined(__linux__)
  const uintptr_t page = uintptr_t(2) << 20, lo = ((uintptr_t)c.grad + page - 1) / page * page, hi = ((uintptr_t)c.grad + all) / page * page;
  if (hi > lo) madvise((void *)lo, hi - lo, MADV_HUGEPAGE);
#endif
  return true;
}

template <class Real> void run(const kd_call &c, const Plan &plan) {
  const RowJob<Real> job(c, plan, c.mirror != nullptr);
  std::optional<MirrorJob<Real>> both;
  if (c.mirror) both.emplace(*c.mirror, plan, job, sizeof(Real) == 8, streams(*c.mirror));
  const MirrorJob<Real> *const mirror = both ? &*both : nullptr;
  const int64_t blocks = job.blocks(), row_bytes = c.grad_width * element_size(c.student_dtype), all = c.rows * row_bytes;
  const bool streaming = streams(c);
  const bool small = c.rows * c.vocab < 32768;       // not worth waking a thread for
  const int threads = small || c.threads < 1 ? 1 : c.threads;
  const bool split = c.rows < 4 * threads && blocks >= 2 * threads && threads > 1;

  // The workspace: the gradient's last rows, which are written last and have none themselves, or else at most 1 % of its size. A
  // workspace for all blocks that takes a share a of the rows saves 1 - a of the second exponentials; for a fraction f of the blocks
  // it saves f - a f^2, most at f = 1 / (2 a). So it never takes more than half of the rows.
  const int64_t share = split ? (blocks + threads - 1) / threads : blocks;
  int64_t want = share > 1 && (c.grad || mirror) ? share * job.slot_bytes() + 64 : 0, tail = 0, room = 0;
  if (want && c.grad && c.fresh && !split) {
    tail = smaller((threads * want + row_bytes - 1) / row_bytes, c.rows / 2);
    const int64_t found = smaller(want, tail * row_bytes / threads);
    if (found < job.slot_bytes() + 64) tail = 0; else want = found;
  }
  if (!tail) {
    const int64_t most = at_least(int64_t(double(all) * .009), int64_t(512) << 10) / threads;
    room = want ? smaller(share * job.slot_bytes() + 64, most) : 0;
  }
  char *const tail_start = tail ? (char *)c.grad + (all - tail * row_bytes) : nullptr;
  const int64_t chunk = at_least(1, smaller(16, c.rows / (8 * threads)));

  Part *shared_parts = split ? allocate<Part>(blocks) : nullptr, *shared_mirror_parts = split && mirror ? allocate<Part>(blocks) : nullptr;
  SmoothPart *shared_hard = split ? allocate<SmoothPart>(blocks) : nullptr;
  StatPart *shared_stats = split && c.stats ? allocate<StatPart>(blocks) : nullptr;
  typename RowJob<Real>::State shared{shared_parts, shared_hard, shared_stats, Row(), HardRow(), 1};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Desk<Real> desk;
    const int me = thread_number();
    void *own = room ? std::malloc(room) : nullptr;
    char *start = tail ? tail_start + me * want : (char *)own;
    if (start) {
      desk.workspace = (Real *)round_up((uintptr_t)start, 64);
      desk.capacity = ((tail ? want : room) - 64) / job.slot_bytes();
      if (desk.capacity < 0) desk.capacity = 0;
    }
    if (split) {
      const int64_t mine = (blocks + thread_count() - 1) / thread_count(), lo = smaller(me * mine, blocks), hi = smaller(lo + mine, blocks);
      for (int64_t row = 0; row < c.rows; row++) {
        bool counts = true;
#pragma omp barrier
        if (me == 0) {
          shared.row = Row(); shared.kept = true;
          shared.weight = job.begin(shared, row) ? shared.weight : 0;
          typename RowJob<Real>::State none{shared_parts};
          if (mirror && shared.weight == 0) mirror->alone.begin(none, row);
        }
#pragma omp barrier
        counts = shared.weight != 0;
        while (counts) {
          job.sweep_blocks(shared, row, lo, hi, desk);
#pragma omp barrier
          if (me == 0) job.close(shared, row, desk);
#pragma omp barrier
          if (!shared.row.refine) break;
        }
        if (!counts) continue;
        if (job.mixed() && !shared.row.lost) {
          job.mix_blocks(shared, row, lo, hi, desk);
#pragma omp barrier
          if (me == 0) job.close_mixed_row(shared, row, desk);
#pragma omp barrier
        }
        if (mirror && mirror->shared.goes_on(shared)) {
          mirror->shared.emit_blocks(shared, row, lo, hi, desk, mirror->streaming);
        } else if (mirror) {
#pragma omp barrier
          if (me == 0) mirror->run_row(shared, row, desk, shared_mirror_parts);
#pragma omp barrier
        }
        if (!shared.row.lost) { if (c.grad) job.emit_blocks(shared, row, lo, hi, desk, streaming); }
        else if (me == 0) job.careful_row(shared, row, desk, streaming);
      }
    } else {
      Part *parts = allocate<Part>(blocks), *mirror_parts = mirror ? allocate<Part>(blocks) : nullptr;
      SmoothPart *hard_parts = allocate<SmoothPart>(blocks);
      StatPart *stat_parts = c.stats ? allocate<StatPart>(blocks) : nullptr;
      typename RowJob<Real>::State s{parts, hard_parts, stat_parts, Row(), HardRow(), 1};
#pragma omp for schedule(dynamic, chunk)
      for (int64_t row = 0; row < c.rows - tail; row++) run_alone(job, s, row, desk, c.grad != nullptr, streaming, mirror, mirror_parts);
      desk.capacity = tail ? 0 : desk.capacity;
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = c.rows - tail; row < c.rows; row++) run_alone(job, s, row, desk, c.grad != nullptr, streaming, mirror, mirror_parts);
      std::free(parts);
      std::free(mirror_parts);
      std::free(hard_parts);
      std::free(stat_parts);
    }
    std::free(own);
    stream_fence();
  }
  std::free(shared_parts);
  std::free(shared_mirror_parts);
  std::free(shared_hard);
  std::free(shared_stats);
}

// ---------------------------------------------------------------- log_softmax
template <class Real> void log_softmax_rows(const kd_log_softmax_call &c) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  constexpr int64_t N = kBlock<Real>;
  const double k = 1 / c.temperature;
  const int64_t size = element_size(c.dtype), blocks = (c.vocab + N - 1) / N;
  const bool streaming = c.rows * c.vocab * size > (int64_t(8) << 20);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.rows * c.vocab >= 32768 && c.threads > 1)
  for (int64_t row = 0; row < c.rows; row++) {
    alignas(64) Real buffer[kSlot<Real>], up[kSlot<Real>];
    const char *x = (const char *)c.logits + row * c.logits_stride * size, *u = c.upstream ? (const char *)c.upstream + row * c.upstream_stride * size : nullptr;
    const auto fetch = [&](const char *p, int64_t i, Real *to) {
      const int64_t n = smaller(N, c.vocab - i * N);
      load_row(p, c.dtype, i * N, n, to);
      for (int64_t j = n; j < round_up(n, W); j++) to[j] = p == x ? Real(-INFINITY) : Real(0);
      return round_up(n, W);
    };
    // at T = inf every class that is not masked has the same logit
    const auto scaled = [&](F v, Real top) { return k > 0 ? (v - top) * Real(k) : select(v == Real(-INFINITY), v, v - v); };
    double top = -INFINITY, rest = 0, total = 0;
    bool broken = false;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t n = fetch(x, i, buffer);
      const double t = largest<Real>(buffer, n);
      if (t > top) { rest = top > -INFINITY ? (rest + 1) * std::exp(k > 0 ? (top - t) * k : 0) : 0; }
      else if (t > -INFINITY) { rest += 0; }
      const double next = t > top ? t : top;
      typename Vec<Real>::D others{}, ties{}, sums{};
      typename Vec<Real>::I nan{};
      for (int64_t j = 0; j < n; j += W) {
        const F v = load<F>(buffer + j), a = scaled(v, Real(next)) * Real(kLog2e);
        const F e = exp2_of_product(a, Real(1), Exp2<Real>::kFloor);
        nan |= v != v;
        others += __builtin_convertvector(select(a == Real(0), F{}, e), typename Vec<Real>::D);
        ties += __builtin_convertvector(select(a == Real(0), splat<F>(1), F{}), typename Vec<Real>::D);
      }
      for (int j = 0; j < W; j++) broken |= nan[j] != 0;
      rest += sum_of<Real>(others) + (sum_of<Real>(ties) - (t > top ? 1 : 0));
      top = next;
      if (u) {
        const int64_t m = fetch(u, i, up);
        for (int64_t j = 0; j < m; j += W) sums += __builtin_convertvector(load<F>(up + j), typename Vec<Real>::D);
        total += sum_of<Real>(sums);
      }
    }
    if (!std::isfinite(top)) broken = true;
    const Real log_total = broken ? Real(NAN) : Real(std::log1p(rest)), inverse = Real(total / (1 + rest));
    for (int64_t i = 0; i < blocks; i++) {
      fetch(x, i, buffer);
      if (u) fetch(u, i, up);
      store_row((char *)c.out + row * c.out_stride * size, c.dtype, i * N, smaller(N, c.vocab - i * N), streaming, Real(0), [&](int64_t j) {
        const F a = scaled(load<F>(buffer + j), Real(top));
        if (!u) return F(a - log_total);
        const F a2 = a * Real(kLog2e), e = exp2_of_product(a2, Real(1), Exp2<Real>::kFloor);
        return F((load<F>(up + j) - e * inverse + log_total * Real(0)) * Real(k));
      });
    }
    if (streaming) stream_fence();
  }
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

extern "C" {
int32_t KD_CONCAT(kd_loss_, KD_ISA)(kd_call *c) {
  using namespace kd::KD_LEVEL;
  const bool wide = c->student_dtype == KD_F64 || c->teacher_dtype == KD_F64;
  const Plan plan = make_plan(*c, wide);
  if (wide) run<double>(*c, plan); else run<float>(*c, plan);
  return KD_OK;
}
int32_t KD_CONCAT(kd_log_softmax_, KD_ISA)(const kd_log_softmax_call *c) {
  using namespace kd::KD_LEVEL;
  if (c->dtype == KD_F64) log_softmax_rows<double>(*c); else log_softmax_rows<float>(*c);
  return KD_OK;
}
}

#else  // ---------------------------------------------------------------- the C functions

#define KD_LEVEL dispatch
#include <cstdlib>
#include "divergence.h"

#define KD_DECLARE(level) \
  extern "C" int32_t kd_loss_##level(kd_call *); \
  extern "C" int32_t kd_log_softmax_##level(const kd_log_softmax_call *);
KD_DECLARE(v2) KD_DECLARE(v3) KD_DECLARE(v4) KD_DECLARE(base)

namespace {
struct Level { const char *name; int32_t (*loss)(kd_call *); int32_t (*log_softmax)(const kd_log_softmax_call *); };

// The best level that was built and that the processor has; "none" without one. KDKERNELS_CPU_ISA = v2 or v3 asks for less, to
// compare levels and to test them.
Level choose() {
#if defined(KD_X86_LEVELS)
  const char *asked = std::getenv("KDKERNELS_CPU_ISA");
  const char most = asked && asked[0] == 'v' ? asked[1] : '4';
  __builtin_cpu_init();
#if defined(KD_HAS_v4)
  if (most >= '4' && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return {"x86-64-v4", kd_loss_v4, kd_log_softmax_v4};
#endif
#if defined(KD_HAS_v3)
#if defined(__clang__) || __GNUC__ >= 11
  const bool halves = __builtin_cpu_supports("f16c");
#else
  const bool halves = true;                          // these compilers cannot ask; what has avx2 has it
#endif
  if (most >= '3' && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && halves)
    return {"x86-64-v3", kd_loss_v3, kd_log_softmax_v3};
#endif
#if defined(KD_HAS_v2)
  if (__builtin_cpu_supports("sse4.2")) return {"x86-64-v2", kd_loss_v2, kd_log_softmax_v2};
#endif
  return {"none", nullptr, nullptr};
#else
  return {"base", kd_loss_base, kd_log_softmax_base};
#endif
}
const Level &level() { static const Level chosen = choose(); return chosen; }
}  // namespace

#define KD_API extern "C" __attribute__((visibility("default")))

KD_API int32_t kd_loss(kd_call *c) {
  if (!c || c->rows < 0 || c->vocab <= 0 || c->inner <= 0 || !level().loss) return KD_BAD_CALL;
  if (c->labels) {
    for (int64_t r = 0; r < c->rows; r++) {
      const bool counts = !c->weight || c->weight[r] != 0;
      if (counts && (c->labels[r] < 0 || c->labels[r] >= c->vocab)) { c->bad_row = r; return KD_BAD_LABEL; }
    }
  }
  return c->rows ? level().loss(c) : int32_t(KD_OK);
}
KD_API int32_t kd_log_softmax(const kd_log_softmax_call *c) { return c->rows ? level().log_softmax(c) : int32_t(KD_OK); }
KD_API int64_t kd_call_size(void) { return sizeof(kd_call); }
KD_API int64_t kd_log_softmax_call_size(void) { return sizeof(kd_log_softmax_call); }
KD_API const char *kd_families(void) { return kd::dispatch::kNames; }
KD_API const char *kd_isa(void) { return level().name; }
KD_API int kd_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

#endif

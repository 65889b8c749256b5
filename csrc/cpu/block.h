// One block of classes, in vectors: its references, the sweeps over it, with as much care as it turns out to
// need, and its gradient.
#pragma once
#include <type_traits>
#include "dtype.h"
#include "../row.h"

namespace kd {
namespace KD_LEVEL {
namespace {  // cpu.cpp is alone in including it, and a compiler does more with what nobody else can call

static_assert(KD_BF16 == int(DtypeCode::kBF16) && KD_F16 == int(DtypeCode::kF16) &&
                  KD_F32 == int(DtypeCode::kF32) && KD_F64 == int(DtypeCode::kF64),
              "");

// of Reals: a block of both rows fits the first-level cache
constexpr int64_t kBlockBytes = 16384;
constexpr int kLost = 3;  // a block that only careful.h can take
template <class Real> constexpr int64_t kBlock = kBlockBytes / sizeof(Real);
// nothing within it over- or underflows: 2^43 2^-125
template <class Real> constexpr Real kReach = sizeof(Real) == 4 ? 43 : 430;

KD_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KD_HD int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
KD_HD int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
constexpr int kKept = 4;  // what a block keeps (RowJob::slots)
// one kept array of a block; a vector may be read past its end
template <class Real> constexpr int64_t kSlot = kBlock<Real> + 64 / sizeof(Real);

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
  if constexpr (std::is_same<S, bf16>::value)
    return largest_half((const uint16_t *)x, n, half_value<bf16>, 0xff80);
  if constexpr (std::is_same<S, f16>::value)
    return largest_half((const uint16_t *)x, n, half_value<f16>, 0xfc00);
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  F a = splat<F>(-INFINITY), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    a = larger(load_as<F>(x + i), a);
    b = larger(load_as<F>(x + i + W), b);
  }
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

// Where a block's differences are measured from: near their mean under b, so that what is summed is as small
// as what is wanted. The mean is estimated from 64 classes spread over the block and the largest one, which
// alone decides where it dominates. Returns where that is.
template <class Real, class S> int64_t find_references(const S *b, const S *o, int64_t n, double k, Part &p) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W, kVectors = 64 / W;
  const Real top = largest<Real>(b, n);
  const auto difference_at = [&](int64_t i) {
    return double(element<Real>(o, i)) - double(element<Real>(b, i));
  };
  int64_t first = 0;
  p.top = top;
  // no class of the base here: what the other has is measured from its own largest
  if (top == -INFINITY) {
    p.top = largest<Real>(o, n);
    p.ref = 0;
  } else if (std::isfinite(top)) {
    first = find(b, n, top);
    p.ref = difference_at(first);
    for (int64_t j = 0; j < n && !std::isfinite(p.ref); j++) p.ref = difference_at(j);
    if (!std::isfinite(p.ref)) p.ref = 0;
    if (n < 256) return first;
    const Real at = Real(p.ref), c = Real(k * kLog2e);
    F weight{}, mean{};
    for (int i = 0; i < kVectors; i++) {
      const int64_t j = (n - W) / kVectors * i;
      const F vb = load_as<F>(b + j), x = (load_as<F>(o + j) - vb) - at, a = (vb - top) * c;
      const F w = select(x - x == Real(0), exp2_of_product(a, Real(1), Exp2<Real>::kFloor), F{});
      weight += w;
      mean += select(w > Real(0), w * x, F{});
    }
    double w = 0, m = 0;
    for (int j = 0; j < W; j++) {
      w += weight[j];
      m += mean[j];
    }
    const double each = n / 64.;  // classes that one of the sample stands for
    p.ref = Real(p.ref + each * m / (1 + each * w));
  }
  return first;
}

// Sums are formed in vectors of Real over at most 64 terms a lane, then in fp64.
template <class Real> struct Accumulator {
  using F = typename Vec<Real>::F;
  using I = typename Vec<Real>::I;
  using D = typename Vec<Real>::D;
  D s{}, d{}, k1{}, k2{}, t{}, others{}, ties{}, log_b{}, log_o{};
  I wild{};
  template <Shape kShape, bool kStats = false> KD_HD void add(Sums<F> &x, I &w) {
    if (kStats) {
      log_b += __builtin_convertvector(x.log_b, D);
      log_o += __builtin_convertvector(x.log_o, D);
      others += __builtin_convertvector(x.others, D);
      ties += __builtin_convertvector(x.ties, D);
    }
    s += __builtin_convertvector(x.s, D);
    d += __builtin_convertvector(x.d, D);
    k1 += __builtin_convertvector(x.k1, D);
    if (kShape == kTilted) {
      k2 += __builtin_convertvector(x.k2, D);
      t += __builtin_convertvector(x.t, D);
    }
    wild = w > wild ? w : wild;
    x = Sums<F>{};
    w = I{};
  }
  Real reach() const {
    auto worst = wild[0];
    for (int j = 1; j < Vec<Real>::W; j++) worst = wild[j] > worst ? wild[j] : worst;
    return from_bits(worst);
  }
};

// step over the block's vectors; the last, partial one is filled up with masked classes. kAhead: the next
// block is asked for meanwhile.
template <class Real, bool kAhead = true, class S, class Full, class Last, class Flush>
KD_HD void each_vector(const S *b, const S *o, int64_t n, Full full, Last last, Flush flush) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  const int64_t whole = n / W * W;
  for (int64_t i0 = 0; i0 < whole; i0 += 64 * W) {
    const int64_t end = smaller(i0 + 64 * W, whole);
    for (int64_t i = i0; i < end; i += W) {
      if (kAhead) {
        __builtin_prefetch(o + i + kBlock<Real>);
        __builtin_prefetch(b + i + kBlock<Real>);
      }
      full(i, load_as<F>(b + i), load_as<F>(o + i));
    }
    flush();
  }
  if (whole < n) {
    Real tb[W], to[W];
    for (int j = 0; j < W; j++) tb[j] = to[j] = -INFINITY;
    copy_row(b + whole, n - whole, tb);
    copy_row(o + whole, n - whole, to);
    last(whole, load<F>(tb), load<F>(to));
    flush();
  }
}

template <class Real>
References<Real> references(const Plan &plan, double top, double at, bool carry, Real reach) {
  const Real ref = Real(at), c = Real(plan.c);
  return {Real(top),
          ref,
          carry ? Real(at - ref) : 0,
          c,
          plan.exact ? Real(plan.c_low) : 0,
          Real(plan.tilt),
          Exp2<Real>::kFloor / c,
          reach,
          !plan.student_base};
}

template <Shape kShape, Care kCare, bool kStats, class Real, class S>
void sweep(const S *b, const S *o, int64_t n, const Plan &plan, StatPart *stats, Real *const *keep, Part &p,
           Real reach) {
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
  each_vector<Real>(
      b, o, n,
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) {
        put(i, vb, vo, step<kShape, kCarry, kCare == kMasked, kLogs>(vb, vo, r, s, wild));
      },
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) {
        put(i, vb, vo, step<kShape, kCarry, true, kLogs>(vb, vo, r, s, wild));
        // for kMasked
        if (kCare != kMasked)
          wild = (vb == Real(-INFINITY)) ^ (vo == Real(-INFINITY)) ? I{} + Exp2<Real>::kAbs : wild;
      },
      [&]() __attribute__((always_inline)) { total.template add<kShape, kStats>(s, wild); });
  p.s = sum_of<Real>(total.s);
  p.d = sum_of<Real>(total.d);
  p.k1 = sum_of<Real>(total.k1);
  p.offset = plan.k * (double(r.ref) + r.ref_low);
  p.k2 = sum_of<Real>(total.k2);
  p.t = sum_of<Real>(total.t);
  if (kStats) {
    stats->log_b = sum_of<Real>(total.log_b) * plan.k;
    stats->log_o = sum_of<Real>(total.log_o) * plan.k;
    const double ties = sum_of<Real>(total.ties);
    stats->rest = sum_of<Real>(total.others) + (ties > 0 ? ties - 1 : 0);
    stats->top_o = largest_lane<Real>(top_o);
    if (kLogs == kBriefLogs) stats->log_o = other_log(p, stats->log_b, stats->log_o);
  }
  p.care = total.reach() <= reach ? int(kCare) : kLost;
  p.lone = !none_of(lone);
}

// Where the second sweep measures from: the row's own shift, put so that a reference of the first that was
// right stays as it is.
template <class Real> struct Moved {
  double missing;  // what the first sweep's references lacked
  Real rest;       // what these lack, in base 2
  References<Real> r;
  Moved(const Plan &plan, const Part &p, double shift, bool carry) : missing(shift - p.offset) {
    const References<Real> first = references<Real>(plan, p.top, p.ref, p.care != kFast, 0);
    const double before = double(first.ref) + first.ref_low;
    r = references(plan, p.top, before + missing / plan.k, carry, kReach<Real>);
    rest = Real((missing - plan.k * ((double(r.ref) + r.ref_low) - before)) * kLog2e);
  }
};

// The second sweep of the mixture family, from the row's own shift and from what the first has kept: e and
// e^y - 1.
template <Care kCare, Second kHow, class Real, class S>
void sweep_mixed(const S *b, const S *o, int64_t n, const Plan &plan, const Mixed<Real> &member, double shift,
                 Real *const *keep, Part &p) {
  const Mixed<Real> mix = member;                         // ours: no store can change it
  Real *const kept_e = keep[0], *const kept_m = keep[1];  // q and xi take their places
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
    if constexpr (kHow == kByClass)
      k = step_mixed<kCarry, kMask>(vb, vo, r, mix, rest, e, e + e * share, s,
                                    kMask || kCarry ? wild : unseen);
    else
      k = step_kept<kHow, kLast>(vb, vo, r, mix, rest, e, share, s);
    if (kMask || !mix.student_base) store(kept_e + i, k.e);  // else it is e
    store(kept_m + i, k.em);
  };
  each_vector<Real, false>(
      b, o, n,
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) { put(i, vb, vo, std::false_type{}); },
      [&](int64_t i, F vb, F vo) __attribute__((always_inline)) { put(i, vb, vo, std::true_type{}); },
      [&]() __attribute__((always_inline)) { total.template add<kTilted>(s, wild); });
  p.moved = sum_of<Real>(total.d);
  p.terms = sum_of<Real>(total.k1);
  p.lacks = sum_of<Real>(total.k2);
  p.excess = sum_of<Real>(total.t);
  if (kHow > kTvdGap)
    close_kept(kHow, plan.mixture, sum_of<Real>(total.s), p.excess, back * p.d + back_1 * p.s, p);
  if (!(total.reach() <= r.reach)) p.care = kLost;
}

template <class Real, class S>
void sweep_mixed(const S *b, const S *o, int64_t n, const Plan &plan, const Mixed<Real> &mix, const Row &row,
                 Real *const *keep, Part &p, Real *wide_b, Real *wide_o) {
  // the first sweep has seen that y is within reach of its own references, which is enough for those that are
  // not far from them
  if (p.care == kFast && std::fabs(row.shift - p.offset) < 13) {
    const auto with = [&](auto how) {
      sweep_mixed<kFast, decltype(how)::value>(b, o, n, plan, mix, row.shift, keep, p);
    };
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
    copy_row(b, n, wide_b);
    copy_row(o, n, wide_o);
    sweep_mixed(wide_b, wide_o, n, plan, mix, row, keep, p, wide_b, wide_o);
  } else if (p.care == kExact) {
    sweep_mixed<kExact, kByClass>(b, o, n, plan, mix, row.shift, keep, p);
  } else {
    sweep_mixed<kMasked, kByClass>(b, o, n, plan, mix, row.shift, keep, p);
  }
}

template <class Real, class S>
void sweep(int care, const S *b, const S *o, int64_t n, const Plan &plan, StatPart *stats, Real *const *keep,
           Part &p, Real *wide_b, Real *wide_o) {
  if constexpr (Half<S>::value)
    if (care != kFast) {  // the careful forms exist for Real alone
      copy_row(b, n, wide_b);
      copy_row(o, n, wide_o);
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
  const auto with = [&](auto shape) {
    if (stats)
      with_both(shape, std::true_type{});
    else
      with_both(shape, std::false_type{});
  };
  if (plan.tilted) {
    with(std::integral_constant<Shape, kTilted>{});
  } else if (plan.mixed) {
    with(std::integral_constant<Shape, kMixed>{});
  } else {
    with(std::integral_constant<Shape, kPlain>{});
  }
}

// Whether the rounding of 16-bit differences is more than 1e-7 of what the block adds to D, `own` for each of
// its s. Their rounding errors are of a few classes, or, where one of the rows is near 0 and the other is
// not, of all and alike, so that they do not average out.
template <class Real, class S>
bool rounding_shows(const S *b, const S *o, int64_t n, const Real *e, double k, double s, double own) {
  using F = typename Vec<Real>::F;
  typename Vec<Real>::D total{};
  F sum{};
  const auto add = [&](int64_t i, F vb, F vo) __attribute__((always_inline)) {
    const F lost = lost_in_difference(vo, vb), weight = load<F>(e + i);
    sum += select(weight > F{}, weight * lost * lost, F{});
  };
  each_vector<Real, false>(b, o, n, add, add, [&]() __attribute__((always_inline)) {
    total += __builtin_convertvector(sum, typename Vec<Real>::D);
    sum = F{};
  });
  return k * k * sum_of<Real>(total) > 5e-15 * own * s;
}

// A block from its logits: references (unless the row has given its own), then as much care as it turns out
// to need.
template <class Real, class S>
void measure_block(const S *b, const S *o, int64_t n, const Plan &plan, StatPart *stats, const double *ref,
                   Real *const *keep, Part &p, Real *wide_b, Real *wide_o) {
  p = Part();
  if (stats) *stats = StatPart();
  const int64_t first = find_references<Real>(b, o, n, plan.k, p);
  if (stats) stats->first_b = first;
  if (ref) p.ref = *ref;
  if (p.top == -INFINITY) {  // no class at all, unless a nan hides there
    for (int64_t i = 0; i < n; i++)
      if (element<Real>(b, i) != element<Real>(b, i) || element<Real>(o, i) != element<Real>(o, i))
        p.care = kLost;
    return;
  }
  if (!std::isfinite(p.top)) {
    p.care = kLost;
    return;
  }
  sweep(plan.exact && !Half<S>::value ? kExact : kFast, b, o, n, plan, stats, keep, p, wide_b, wide_o);
  if (p.care == kLost) return sweep(kMasked, b, o, n, plan, stats, keep, p, wide_b, wide_o);
  // brief logs cancel where the references were far off and little of the other is left
  if (stats && p.s + p.d < .25 * p.s) {
    sweep(kMasked, b, o, n, plan, stats, keep, p, wide_b, wide_o);
    if (p.care == kMasked) p.care = kExact;  // which is the same without masks
    return;
  }
  // The rounding of o - b, 2^-24 of the offset, must stay under 1e-6 of the differences that remain; 16-bit
  // logits seldom have any.
  if (p.care != kFast) return;
  const double d = p.d / p.s, own = p.k1 / p.s - (d - std::log1p(d)), off = plan.k * p.ref;
  if (!(off * off > 512 * own)) return;
  if constexpr (Half<S>::value)
    if (!rounding_shows(b, o, n, keep[0], plan.k, p.s, own)) return;
  sweep(kExact, b, o, n, plan, stats, keep, p, wide_b, wide_o);
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
    if (kSmooth) {
      const auto there = vz > Real(-INFINITY);
      b += select(there, top - vz, F{});
      c += select(there, splat<F>(1), F{});
    }
  };
  each_vector<Real>(z, z, n, full, full, [&]() __attribute__((always_inline)) {
    rest += __builtin_convertvector(r, D);
    ties += __builtin_convertvector(t, D);
    r = F{};
    t = F{};
    if (kSmooth) {
      below += __builtin_convertvector(b, D);
      count += __builtin_convertvector(c, D);
      b = F{};
      c = F{};
    }
  });
  p.below = sum_of<Real>(below);
  p.count = sum_of<Real>(count);
  p.rest = sum_of<Real>(rest) + (sum_of<Real>(ties) - 1);
  p.s = 1 + p.rest;
  return p;
}

// ---------------------------------------------------------------- emitting a block
// sum_j factor[j] * kept[j]. kTimesFirst: the second of them is times the first, so that what is subtracted
// has not been rounded yet; kAndRest: with left_over.
enum Emission { kSum, kTimesFirst, kAndRest };
template <int kArrays, Emission kHow, class Real>
void emit(const Real *const *kept, const double *factors, Real rest, void *out, int32_t dtype, int64_t i,
          int64_t n, bool streaming) {
  using F = typename Vec<Real>::F;
  const Real *rows[kArrays];
  Real factor[kArrays];
  for (int j = 0; j < kArrays; j++) {
    rows[j] = kept[j];
    factor[j] = Real(factors[j]);
  }
  store_row(out, dtype, i, n, streaming, Real(0), [=](int64_t l) __attribute__((always_inline)) {
    F g = load<F>(rows[0] + l);
    if (kHow == kAndRest)
      g *= (load<F>(rows[1] + l) * factor[1] + factor[0]) + rest;
    else if (kHow == kTimesFirst)
      g *= load<F>(rows[1] + l) * factor[1] + factor[0];
    else
      g *= factor[0];
    for (int j = kHow != kSum ? 2 : 1; j < kArrays; j++) g += load<F>(rows[j] + l) * factor[j];
    return g;
  });
}

template <class Real>
void emit(int arrays, Emission how, const Real *const *kept, const double *factors, Real rest, void *out,
          int32_t dtype, int64_t i, int64_t n, bool streaming) {
  const auto with = [&](auto count, auto form) {
    emit<decltype(count)::value, decltype(form)::value>(kept, factors, rest, out, dtype, i, n, streaming);
  };
  const auto mixed = [&](auto form) {
    if (arrays == 2)
      with(std::integral_constant<int, 2>{}, form);
    else
      with(std::integral_constant<int, 3>{}, form);
  };
  const std::integral_constant<Emission, kSum> sum;
  if (how == kAndRest)
    mixed(std::integral_constant<Emission, kAndRest>{});
  else if (how == kTimesFirst)
    mixed(std::integral_constant<Emission, kTimesFirst>{});
  else if (arrays == 1)
    with(std::integral_constant<int, 1>{}, sum);
  else if (arrays == 2)
    with(std::integral_constant<int, 2>{}, sum);
  else if (arrays == 3)
    with(std::integral_constant<int, 3>{}, sum);
  else
    with(std::integral_constant<int, 4>{}, sum);
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

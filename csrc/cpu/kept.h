// What a block keeps for its gradient, by family, and the gradient as a function of that.
//
// A block's slot is an array of Reals for each number that its family keeps, and one for the hard term's
// exponentials.
#pragma once
#include "block.h"

namespace kd {
namespace KD_LEVEL {
namespace {

constexpr int kMostArrays = 4;  // of a slot

// Of a kept array, a vector, or, as a double, one class.
template <class F, class Real> KD_HD F kept_at(const Real *p) {
  if constexpr (std::is_same<F, double>::value)
    return double(*p);
  else
    return load<F>(p);
}

// x factor, with which a sum begins. A class's sum begins with 0, so that its products are fused one after
// the other.
template <class F, class Factor> KD_HD F begin_sum(F x, Factor factor) {
  if constexpr (std::is_same<F, double>::value)
    return 0. + x * factor;
  else
    return x * factor;
}

template <class Real> KD_HD Real *next_array(Real *&room) {
  Real *p = room;
  room += kSlot<Real>;
  return p;
}
template <class Real> void clear_array(Real *p) { std::memset(p, 0, kSlot<Real> * sizeof(Real)); }

template <class Family, class Real> struct KeptArrays;

// C e + A em
template <class Real> struct PlainGradient {
  const Real *e, *em;
  Real C, A;
  template <class F> KD_HD F at(int64_t i) const {
    F g = begin_sum(kept_at<F>(e + i), C);
    g += kept_at<F>(em + i) * A;
    return g;
  }
};
template <class Real> struct KeptArrays<Plain, Real> {
  using F = typename Vec<Real>::F;
  Real *e, *em;
  static int arrays(const Plan &) { return 2; }
  KeptArrays(Real *room, const Plan &) : e(next_array(room)), em(next_array(room)) {}
  KD_HD void put(int64_t i, const Plain::Kept<F> &k) const {
    store(e + i, k.e);
    store(em + i, k.em);
  }
  void clear() const {
    clear_array(e);
    clear_array(em);
  }
  template <class Use> void gradient(const Coefficients &k, const Part &, int64_t, Use use) const {
    use(PlainGradient<Real>{e, em, Real(k.C), Real(k.A)});
  }
};

// C e + A em + B et; without em where the student is the base, as A is 0.
template <class Real> struct TiltedGradient {
  const Real *e, *em, *et;
  Real C, A, B;
  template <class F> KD_HD F at(int64_t i) const {
    F g = begin_sum(kept_at<F>(e + i), C);
    g += kept_at<F>(em + i) * A;
    g += kept_at<F>(et + i) * B;
    return g;
  }
};
template <class Real> struct KeptArrays<Tilted, Real> {
  using F = typename Vec<Real>::F;
  Real *e, *em, *et;  // em is null where the student is the base
  static int arrays(const Plan &plan) { return plan.base(2, 3); }
  KeptArrays(Real *room, const Plan &plan)
      : e(next_array(room)), em(arrays(plan) == 3 ? next_array(room) : nullptr), et(next_array(room)) {}
  KD_HD void put(int64_t i, const Tilted::Kept<F> &k) const {
    store(e + i, k.e);
    if (em) store(em + i, k.em);
    store(et + i, k.et);
  }
  void clear() const {
    clear_array(e);
    if (em) clear_array(em);
    clear_array(et);
  }
  template <class Use> void gradient(const Coefficients &k, const Part &p, int64_t n, Use use) const {
    if (em) return use(TiltedGradient<Real>{e, em, et, Real(k.C), Real(k.A), Real(k.B)});
    if (p.lone) separate_lone(k, n);
    use(PlainGradient<Real>{e, et, Real(k.C), Real(k.B)});
  }
  // Classes that the teacher masks have et = -e, and q = (C - B) e as their gradient. Where C and B are much
  // larger than their difference (the supports have little in common), e takes the ratio, so that the two are
  // not subtracted class by class.
  void separate_lone(const Coefficients &k, int64_t n) const {
    const double q = k.C - k.B;
    if (!(std::fabs(k.C) > std::fabs(q))) return;
    const Real ratio = Real(q / k.C);
    for (int64_t j = 0; j < n; j++) {
      const bool lone = et[j] == -e[j];
      e[j] = lone ? e[j] * ratio : e[j];
      et[j] = lone ? 0 : et[j];
    }
  }
};

// q (A xi + C), so that what is subtracted has not been rounded yet; kRest: and left_over.
template <class Real, bool kRest> struct MixtureGradient {
  const Real *q, *xi;
  Real C, A, rest;
  template <class F> KD_HD F at(int64_t i) const {
    const F by = kept_at<F>(xi + i) * A + C;
    return begin_sum(kept_at<F>(q + i), kRest ? by + rest : by);
  }
};
template <class Real> struct KeptArrays<Mixture, Real> {
  using F = typename Vec<Real>::F;
  Real *e, *share;           // of the first sweep
  Real *const q, *const xi;  // of the second, which puts them in the places of those
  static int arrays(const Plan &) { return 2; }
  KeptArrays(Real *room, const Plan &) : e(next_array(room)), share(next_array(room)), q(e), xi(share) {}
  KD_HD void put(int64_t i, const Mixture::Kept<F> &k) const {
    store(e + i, k.e);
    store(share + i, k.share);
  }
  void clear() const {
    clear_array(q);
    clear_array(xi);
  }
  template <class Use> void gradient(const Coefficients &k, const Part &, int64_t, Use use) const {
    const Real C = Real(k.C), A = Real(k.A), rest = left_over(A, C, Real(k.end));
    if (rest != 0)
      use(MixtureGradient<Real, true>{q, xi, C, A, rest});
    else
      use(MixtureGradient<Real, false>{q, xi, C, A, 0});
  }
};

// A row's gradient in fp64, of careful/, rounded to Reals but not yet scaled.
template <class Real> struct ScaledGradient {
  const Real *soft;
  Real scale;
  template <class F> KD_HD F at(int64_t i) const { return begin_sum(kept_at<F>(soft + i), scale); }
};

// Where the sweeps of a block leave what they find, with room to widen its logits in.
template <class Family, class Real> struct Block {
  KeptArrays<Family, Real> kept;
  Part *part;
  StatPart *stats;  // null where no entropies are asked for
  Real *wide_base, *wide_other;
};

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

// The records that a row passes through: the sums of a block (Part), and the row when they are closed
// (Closed). Everything per block and per row is fp64.
#pragma once
#include "reference.h"

namespace kd {
namespace KD_LEVEL {

// Of a first sweep, besides e and em: sums of e psi(y), e psi(tilt y) and e + et.
struct FirstRest { double psi, psi_tilted, weights; };
// Of the mixture family's second sweep: the sum of the terms of D (of TVD, what q has more); of TVD what p
// has more, and p where q has more; the sum of G.
struct SecondPart { double terms = 0, lacks = 0, excess = 0, G = 0; };

// What the sweeps leave of a block.
struct Part {
  double top = -INFINITY, ref = 0;
  double offset = 0;  // ref / T, of the ref that the sweep had after rounding
  double s = 0;       // sum of e; 0 where the base has no class
  double d = 0;       // sum of em
  union {             // the second takes the place of the first: CUDA's blocks send parts to each other
    FirstRest first;
    SecondPart second;
  };
  double unit = 0;  // what e = 1 stands for in the row: e^{(top - row's top)/T} / total
  int care = kFast;
  bool lone = false;  // kMasked on the CPU: it has a class that only one of the two has
  KD_HD Part() : second{} {}
  KD_HD bool empty() const { return s == 0 && d == 0; }
};

// Of a block, for the entropies and the statistics of its row.
struct StatPart {
  double log_b = 0, log_o = 0;  // sums of e log e and of eo log eo, in units of T
  double rest = 0;              // s - 1 to its own digits: without the largest class
  double top_o = -INFINITY;     // the largest logit of the other
  int64_t first_b = 0;          // where in the block the base's largest is
};

// A row whose sums are closed.
struct Closed {
  double top = -INFINITY, total = 0;  // the largest base logit, sum of e^{(b - top)/T}
  double shift = 0;                   // o's log-sum-exp less b's
  // F: the sum of terms, KL itself for KL; R: of an order, sum of its weights t; value: D
  double F = 0, R = 1, log_r = 0, value = 0;
  double gain = 1;        // T dD/dz = gain (q - w)
  double M = 0;           // of the mixture family: sum of G
  double one_plus_M = 0;  // of TVD, to its own digits; else nan
  bool lost = false;      // outside of the range of the sweep: a row for careful/
  // F's terms cancel, as the references were far from shift: the row is swept once more, with shift for all
  bool refine = false;
};

// A block's gradient is A em + B et + C e, or in the mixture family q (A xi + C). end: of TVD C - A to its
// own digits, what a class with xi = -1 has; of other divergences nan.
struct Coefficients { double A, B, C, end = NAN; };

// What A xi + C lacks once A and C are rounded, given how large it is at xi = -1. Where that is the larger, C
// is what counts, and nothing is added; nor where end is nan.
template <class Real> KD_HD Real left_over(Real A, Real C, Real end) {
  return std::fabs(end) < std::fabs(C) ? end - (C - A) : Real(0);
}

// Who closes a row: one thread, block after block; in csrc/cuda the lanes of a warp, a block to a lane. sum
// adds add(i, sums) over all i < n; first is the least i with the largest of(i).
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

}  // namespace KD_LEVEL
}  // namespace kd

// A team of threads: who they are, what they exchange, and a warp of them as who closes a row.
#pragma once
#include "job.h"

namespace kd {
namespace KD_LEVEL {

// What the threads of a team exchange.
template <class G> struct Scratch {
  RowAt row[2];  // this row, and, in a cluster, the next one
  // of each warp: the largest logits of the base and of the other, and its sums (SumPlace)
  float top[G::kWarps], other_top[G::kWarps];
  float sums[G::kWarps][16];
  // of the tile: the difference at the top, the sample's sums (sample), the other's largest logit
  float at_top, weight, mean, top_o;
  // of the row, once it is closed: its shift in logits, the hard term's gradient at the label, and label
  // smoothing's summand for each class that is not masked
  double ref, label_gradient;
  float smoothing;
  float ref_high, ref_low, ref_rest;  // ref as the second sweep takes it: a RowReference
  int lost, again;                    // again: the row is swept once more, with ref as every tile's reference
  int64_t number;                     // of the row
  int part, from, to, tiles;          // this block's slice of the row, in chunks and tiles
};

template <class G> struct Team {
  static KD_DEVICE int thread() { return int(unsigned(gpu::thread()) % G::kThreads); }
  static KD_DEVICE int lane() { return gpu::thread() & 31; }
  static KD_DEVICE int warp() { return thread() >> 5; }
  static KD_DEVICE void sync() {
    if (G::kThreads == 32)
      gpu::sync_warp();
    else
      gpu::sync_block();
  }
  // Also a barrier.
  static KD_DEVICE bool any(bool x) { return G::kThreads == 32 ? gpu::warp_any(x) : gpu::sync_block_any(x); }
};

// The lanes of a warp as who closes a row (row/close.h).
struct WarpCrew {
  template <int N, class Add> KD_DEVICE void sum(int n, double (&sums)[N], Add add) const {
    double own[N]{};
    // add may write to its part, which others may still be reading
    gpu::sync_warp();
    KD_ROLLED for (int i = (gpu::thread() & 31); i < n; i += 32) add(i, own);
    gpu::warp_sum(own);
    for (int j = 0; j < N; j++) sums[j] += own[j];
    gpu::sync_warp();
  }
  template <class Of> KD_DEVICE int first(int n, Of of) const {
    double most = -INFINITY;
    int where = n - 1;
    KD_ROLLED for (int i = (gpu::thread() & 31); i < n; i += 32) if (of(i) > most) {
      most = of(i);
      where = i;
    }
    const double best = gpu::warp_largest(most);
    return -gpu::warp_largest(most == best ? -where : 1 - n);
  }
};

}  // namespace KD_LEVEL
}  // namespace kd

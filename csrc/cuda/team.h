// A team of threads: who they are, what they exchange, and a warp of them as who closes a row.
#pragma once
#include "job.h"

namespace kd {
namespace KD_LEVEL {

// What the threads of a team exchange.
template <class G> struct Scratch {
  RowAt row[2];  // this one; the next, where it is looked up ahead
  float top[G::kWarps], other_top[G::kWarps];
  float at_top, weight, mean, top_o;
  float sums[G::kWarps][16];
  double ref, label_gradient;
  float smoothing;  // of each class's gradient that is not masked
  // ref as the second sweep of the mixture family takes it, and, in y, what is left
  float ref_high, ref_low, ref_rest;
  // again: the row is swept once more, with ref for everyone's reference
  int lost, again;
  int64_t number;             // of the row
  int part, from, to, tiles;  // this block's slice of it, in chunks
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
  // and a barrier
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

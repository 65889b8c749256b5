// A block of threads that takes a row: sums and maxima over it, in a fixed order.
#pragma once
#include "logits.h"

namespace kd {
namespace KD_LEVEL {

template <class G> struct BlockCrew {
  double *room;  // [kWarps]
  template <class Op> KD_DEVICE double over_warps(double x, Op op) const {
    if ((gpu::thread() & 31) == 0) room[gpu::thread() / 32] = x;
    gpu::sync_block();
    x = room[0];
    for (int i = 1; i < G::kWarps; i++) x = op(x, room[i]);
    gpu::sync_block();
    return x;
  }
  KD_DEVICE double sum(double x) const {
    double one[1]{x};
    gpu::warp_sum(one);
    return over_warps(one[0], [](double a, double b) { return a + b; });
  }
  KD_DEVICE double largest(double x) const {
    return over_warps(gpu::warp_largest(x), [](double a, double b) { return a > b ? a : b; });
  }
  KD_DEVICE bool any(bool x) const { return gpu::sync_block_any(x); }
};

}  // namespace KD_LEVEL
}  // namespace kd

// The reference of a tile, which its team agrees on: its top, and a difference near the mean of those of the
// tile.
#pragma once
#include "tile.h"

namespace kd {
namespace KD_LEVEL {

template <int kSize, class Tile, class At> KD_DEVICE float largest_own(const Tile &t, At at_place, bool f16) {
  Largest<kSize> top(f16);
  t.chunks([&](int place) {
    if (t.inside(place)) return top.add(at_place(place));
    float x[kRun];
    unpack<kSize>(at_place(place), f16, x);
    t.mask(place, x);
    KD_UNROLL for (int i = 0; i < kRun; i++) top.value = gpu::largest(top.value, x[i]);
  });
  return top.get();
}
template <class Tile> KD_DEVICE float largest_base(const Tile &t) {
  return largest_own<Tile::kB>(t, [&](int place) { return t.base_at(place); }, t.base_f16());
}
template <class Tile> KD_DEVICE float largest_other(const Tile &t) {
  return largest_own<Tile::kO>(t, [&](int place) { return t.other_at(place); }, t.other_f16());
}
template <int kWarps> KD_DEVICE float largest_of(const float (&x)[kWarps]) {
  float top = x[0];
  KD_UNROLL for (int i = 1; i < kWarps; i++) top = gpu::largest(top, x[i]);
  return top;
}

constexpr int kSamples = 64;  // classes of a tile by which its mean difference is estimated

// To scratch.at_top: the difference at the tile's largest class, by the thread that has it; `own` is this
// thread's largest.
template <class Tile> KD_DEVICE void find_at_top(const Tile &t, float own, float top) {
  int holder = 0;
  KD_UNROLL for (int i = Tile::G::kWarps - 1; i >= 0; i--) if (t.scratch.top[i] == top) holder = i;
  if (Tile::T::warp() == holder && gpu::warp_first(own == top) == Tile::T::lane()) {
    float found = 0;
    bool hit = false;
    KD_ROLLED for (int place = Tile::T::thread(); place < t.count && !hit; place += Tile::G::kThreads) {
      float b[kRun], o[kRun];
      t.load_base(place, b);
      t.load_other(place, o);
      KD_UNROLL for (int i = kRun - 1; i >= 0; i--) if (b[i] == top) {
        found = o[i] - b[i];
        hit = true;
      }
    }
    t.scratch.at_top = found;
  }
}

// To scratch.weight and scratch.mean: sums of e and e (o - b) over classes spread over the tile, by a warp.
template <class Tile> KD_DEVICE void sample(const Tile &t, float top) {
  float sums[2]{};
  KD_ROLLED for (int i = int(gpu::from_here(int64_t(Tile::T::lane()))); i < kSamples; i += 32) {
    const int place = int(unsigned(t.count * i) / kSamples), l = i & (kRun - 1);
    if (!t.in_row(t.class_of(place) + l)) continue;
    const float b = element<Tile::kB>(t.base_at(place), l, t.base_f16()),
                x = element<Tile::kO>(t.other_at(place), l, t.other_f16()) - b;
    const float w = gpu::exp2((b - top) * t.job.c);
    if (x - x == 0 && w > 0) {
      sums[0] += w;
      sums[1] += w * x;
    }
  }
  gpu::warp_sum(sums);
  if (Tile::T::lane() == 0) {
    t.scratch.weight = sums[0];
    t.scratch.mean = sums[1];
  }
}

// Where differences are measured from: near their mean under the base, as cpu/reference.h has
// it: the difference at the largest class, which alone decides where it dominates, and those of 64 classes
// spread over the tile. `own` is this thread's largest.
template <class Tile> KD_DEVICE float find_reference(const Tile &t, float own, float top) {
  find_at_top(t, own, top);
  if (Tile::T::warp() == 0) sample(t, top);
  Tile::T::sync();
  const float x = t.scratch.at_top, weight = t.scratch.weight, mean = t.scratch.mean;
  if (!(x - x == 0)) return weight > 0 ? mean / weight : 0;
  // classes that one of the sample stands for
  const float each = float(t.count) * (kRun / float(kSamples));
  return x + each * (mean - weight * x) / (1 + each * weight);
}

}  // namespace KD_LEVEL
}  // namespace kd

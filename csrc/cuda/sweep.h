// The first sweep of a tile: to its Part, and, where they are asked for, the sums of the hard term and of the
// statistics.
#pragma once
#include "reference.h"

namespace kd {
namespace KD_LEVEL {

// Where a tile's sums go, by its first warp.
struct TileOut {
  Part *part;
  SmoothPart *hard;
  TileStats *stats;
};
// Where a team publishes them, of the 16 numbers of a warp: up to 5 of the sweep; ties and others; the hard
// term's; label smoothing's; the entropies'; the first classes with the largest logits.
enum SumPlace { kAtSweep = 0, kAtLargest = 5, kAtHard = 8, kAtSmooth = 10, kAtLogs = 12, kAtFirst = 14 };

// A chunk that is not whole: keep(i, what its class i keeps).
template <class Tile, class Keep>
KD_DEVICE void sweep_other(const Tile &t, int place, const Reference<float> &r,
                           FirstSums<typename Tile::Family, float> &s, Keep keep) {
  float b[kRun], o[kRun];
  t.load_base(place, b);
  t.load_other(place, o);
  KD_UNROLL for (int i = 0; i < kRun; i++)
      keep(i, step<typename Tile::Family, Tile::kCarry, true>(b[i], o[i], r, s));
}
// The whole chunks, of which the thread holds what is kept.
template <class Tile>
KD_DEVICE void sweep_whole(Tile &t, const Reference<float> &r, FirstSums<typename Tile::Family, float> &s) {
  t.whole_chunks([&](int j, int place) {
    float b[kRun], o[kRun];
    t.load_whole(place, b, o);
    KD_UNROLL for (int i = 0; i < kRun; i++)
        t.held.put(j * kRun + i, step<typename Tile::Family, Tile::kCarry, false>(b[i], o[i], r, s));
  });
}

template <class Tile> KD_DEVICE void sweep_hard(const Tile &t, float top, float (&x)[2]) {
  t.chunks([&](int place) {
    float z[kRun];
    t.load_student(place, z);
    KD_UNROLL for (int i = 0; i < kRun; i++) step_hard(z[i], top, x[0], x[1]);
  });
}
// How far the classes that are there lie below the largest, and how many they are.
template <class Tile> KD_DEVICE void sweep_smooth(const Tile &t, float top, float (&x)[2]) {
  t.chunks([&](int place) {
    float z[kRun];
    t.load_student(place, z);
    KD_UNROLL for (int i = 0; i < kRun; i++) if (z[i] > -INFINITY) {
      x[0] += top - z[i];
      x[1] += 1;
    }
  });
}

// The entropies' sums, and, negative, the first classes with the largest logits. Before the registers hold
// anything.
template <class Tile> KD_DEVICE void sweep_stats(const Tile &t, const Reference<float> &r, float top_o) {
  using T = typename Tile::T;
  FirstSums<typename Tile::Family, float> s;
  float first_b = INFINITY, first_o = INFINITY;
  t.chunks([&](int place) {
    float b[kRun], o[kRun];
    t.load_base(place, b);
    t.load_other(place, o);
    KD_UNROLL for (int i = 0; i < kRun; i++) {
      step<typename Tile::Family, Tile::kCarry, true, kBothLogs>(b[i], o[i], r, s);
      const float here = float(t.class_of(place) + i);
      if (b[i] == r.top && here < first_b) first_b = here;
      if (o[i] == top_o && here < first_o) first_o = here;
    }
  });
  float largest[2] = {s.logs.others, s.logs.ties}, logs[2] = {s.logs.log_b, s.logs.log_o};
  t.publish(kAtLargest, largest);
  t.publish(kAtLogs, logs);
  first_b = gpu::warp_largest(-first_b);
  first_o = gpu::warp_largest(-first_o);
  if (T::lane() == 0) {
    t.scratch.sums[T::warp()][kAtFirst] = first_b;
    t.scratch.sums[T::warp()][kAtFirst + 1] = first_o;
  }
  if (T::thread() == 0) t.scratch.top_o = top_o;
}
template <class Tile> KD_DEVICE void collect_stats(const Tile &t, TileStats *stats) {  // by a warp
  using T = typename Tile::T;
  double largest[2], logs[2];
  t.collect(kAtLargest, largest);
  t.collect(kAtLogs, logs);
  const int w = T::lane() < Tile::G::kWarps ? T::lane() : 0;
  const float first_b = gpu::warp_largest(t.scratch.sums[w][kAtFirst]),
              first_o = gpu::warp_largest(t.scratch.sums[w][kAtFirst + 1]);
  if (T::lane() == 0) {
    stats->log_b = logs[0] * t.job.plan.k;
    stats->log_o = logs[1] * t.job.plan.k;
    stats->rest = largest[0] + (largest[1] > 0 ? largest[1] - 1 : 0);
    stats->top_o = t.scratch.top_o;
    stats->first_b = -first_b;
    stats->first_o = -first_o;
  }
}

// What a team knows of a tile before it is swept. none: it has no class at all; lost: it is one for careful/.
struct Found {
  Part part;       // with its references
  float hard_top;  // the student's largest logit
  bool lost = false, none = false;
};

// A tile without a class of the base: what the other has is measured from its own largest.
template <class Tile> KD_DEVICE float top_without_base(const Tile &t, Found &found) {
  using T = typename Tile::T;
  const float o = gpu::warp_largest(largest_other(t));
  bool nan = false;
  t.chunks([&](int place) {
    float b[kRun], x[kRun];
    t.load_base(place, b);
    t.load_other(place, x);
    KD_UNROLL for (int i = 0; i < kRun; i++) nan |= b[i] != b[i] || x[i] != x[i];
  });
  found.lost = T::any(nan);
  if (T::lane() == 0) t.scratch.top[T::warp()] = o;
  T::sync();
  const float top = largest_of(t.scratch.top);
  found.none = top == -INFINITY;
  return top;
}

template <class Tile> KD_DEVICE Found find(const Tile &t) {
  using T = typename Tile::T;
  const bool hard_other = t.job.hard && t.job.plan.base(false, true);
  const float own = largest_base(t), of_warp = gpu::warp_largest(own);
  if (T::lane() == 0) t.scratch.top[T::warp()] = of_warp;
  if (hard_other || t.job.entropies) {
    const float o = gpu::warp_largest(largest_other(t));
    if (T::lane() == 0) t.scratch.other_top[T::warp()] = o;
  }
  T::sync();
  Found found;
  float top = largest_of(t.scratch.top);
  found.hard_top = hard_other ? largest_of(t.scratch.other_top) : top;
  if (top == -INFINITY)
    top = top_without_base(t, found);
  else if (top < INFINITY)
    found.part.ref = find_reference(t, own, top);
  found.lost |= !(top < INFINITY);
  found.part.top = top;
  if (t.scratch.again && !found.none) found.part.ref = t.scratch.ref;
  return found;
}

template <class Tile>
KD_DEVICE void publish_sums(const Tile &t, const FirstSums<typename Tile::Family, float> &s) {
  typename Tile::Family::template Sums<float> places;
  float x[sizeof(places) / sizeof(float)];
  int i = 0;
  s.each(places, [&](float, float sum) { x[i++] = sum; });
  t.publish(kAtSweep, x);
}

// The sweep with as much care as the tile turns out to need. False: that is more than a sweep has.
template <class Tile> KD_DEVICE bool sweep_tile(Tile &t, const Reference<float> &r, Part &p) {
  KD_ROLLED for (int masked = 0;; masked++) {
    FirstSums<typename Tile::Family, float> s;
    sweep_whole(t, r, s);
    t.other_chunks([&](int place) { sweep_other(t, place, r, s, [](int, const auto &) {}); });
    publish_sums(t, s);
    const bool far = Tile::T::any(!(from_bits(s.farthest) <= t.job.reach));
    p.care = masked ? kMasked : kFast;
    if (!far) return true;
    if (masked) return false;
    t.allow_whole(false);
  }
}
template <class Tile> KD_DEVICE void publish_hard(const Tile &t, float top) {
  const bool there = top - top == 0;
  if (t.job.hard) {
    float x[2]{};
    if (there) sweep_hard(t, top, x);
    t.publish(kAtHard, x);
  }
  if (t.job.smooth) {
    float x[2]{};
    if (there) sweep_smooth(t, top, x);
    t.publish(kAtSmooth, x);
  }
}

// By a warp, of what the team has published.
template <class Tile> KD_DEVICE void collect_part(const Tile &t, const Reference<float> &r, Part &p) {
  using Sums = typename Tile::Family::template Sums<double>;
  double x[sizeof(Sums) / sizeof(double)];
  t.collect(kAtSweep, x);
  Sums sums;
  int i = 0;
  sums.each(sums, [&](double &to, double) { to = x[i++]; });
  Tile::Family::store(sums, p);
  p.offset = t.job.plan.k * (double(r.ref) + r.ref_low);
}
template <class Tile> KD_DEVICE SmoothPart collect_hard(const Tile &t, float top) {
  SmoothPart h;
  if (t.job.hard) {
    double y[2];
    t.collect(kAtHard, y);
    h.top = top;
    if (top - top == 0) {
      h.rest = y[0] + (y[1] - 1);
      h.s = 1 + h.rest;
    }
  }
  if (t.job.smooth) {
    double y[2];
    t.collect(kAtSmooth, y);
    h.below = y[0];
    h.count = y[1];
  }
  return h;
}

// The tile in the slot, whose copies this thread has waited for, as a block of its row.
template <class Tile> KD_DEVICE void measure(Tile &t, const TileOut &to) {
  t.allow_whole(true);  // one that is measured again may have been a masked one
  Found found = find(t);
  Part &p = found.part;
  const Reference<float> r = t.reference(p);
  if (t.job.entropies) sweep_stats(t, r, largest_of(t.scratch.other_top));
  if (!found.lost && !found.none) found.lost = !sweep_tile(t, r, p);
  publish_hard(t, found.hard_top);
  Tile::T::sync();
  if (Tile::T::warp() != 0) return;
  if (found.lost)
    p.care = kLost;
  else if (!found.none)
    collect_part(t, r, p);
  const SmoothPart h = collect_hard(t, found.hard_top);
  if (t.job.entropies) collect_stats(t, to.stats);
  if (Tile::T::lane() == 0) {
    *to.part = p;
    *to.hard = h;
  }
  gpu::sync_warp();
}

}  // namespace KD_LEVEL
}  // namespace kd

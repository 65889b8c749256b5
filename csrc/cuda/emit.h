// The gradient of a tile: of its whole chunks from the registers, of the others from their logits again.
#pragma once
#include "second.h"

namespace kd {
namespace KD_LEVEL {

// What the gradient of a tile needs besides its logits.
struct TileGradient {
  const Part &part;
  const HardPart &hard;
  Factors factors;
  int label;
  float label_gradient;
};

template <class Tile>
KD_DEVICE void add_hard(const Tile &t, int place, const TileGradient &x, float (&g)[kRun]) {
  float z[kRun];
  t.load_student(place, z);
  const float top = float(x.hard.top), scale = x.hard.s > 0 ? x.factors.hard : 0;
  KD_UNROLL for (int i = 0; i < kRun; i++) {
    const float e = exp2_of_product(z[i] - top, float(kLog2e), 0.f);
    g[i] += t.class_of(place) + i == x.label ? x.label_gradient : scale != 0 ? scale * e : 0;
  }
}
// Label smoothing's summand and the transform's slope, of each class.
template <class Tile> KD_DEVICE void finish_classes(const Tile &t, int place, float (&g)[kRun]) {
  float z[kRun];
  t.load_student(place, z);
  const float smoothing = t.job.smooth ? t.scratch.smoothing : 0;
  KD_UNROLL for (int i = 0; i < kRun; i++) g[i] =
      (g[i] + (z[i] > -INFINITY ? smoothing : 0)) * slope(z[i], t.job.student);
}

// Near which the mixture family takes the student's exponentials of whole chunks, their largest: the base's
// top, moved by the row's shift where the student is the other.
template <class G> KD_DEVICE float top_of_student(float top, const Scratch<G> &scratch, const Job &job) {
  return job.plan.base(top, top + scratch.ref_high);
}

// The gradient of whole chunks, by family: 8 classes from `at` on among those that the thread holds.
template <class Family> struct WholeGradient {
  const Factors &f;
  const Reference<float> &r;
  template <class Tile>
  KD_DEVICE WholeGradient(const Tile &, const Factors &f, const Reference<float> &r) : f(f), r(r) {}
  template <class Tile> KD_DEVICE void operator()(const Tile &t, int place, int at, float (&g)[kRun]) const {
    float b[kRun];
    unpack<Tile::kB>(t.base_at(place), t.base_f16(), b);
    KD_UNROLL for (int i = 0; i < kRun; i++) g[i] = t.held.gradient(at + i, weight_of(b[i], r), f);
  }
};
template <> struct WholeGradient<Mixture> {
  const Reference<float> &r;
  float student_top, A, C, rest;
  template <class Tile>
  KD_DEVICE WholeGradient(const Tile &t, const Factors &f, const Reference<float> &r)
      : r(r),
        student_top(top_of_student(r.top, t.scratch, t.job)),
        A(f.A * f.student),
        C(f.C * f.student),
        rest(left_over(A, C, f.end * f.student)) {}
  template <class Tile> KD_DEVICE void operator()(const Tile &t, int place, int at, float (&g)[kRun]) const {
    float z[kRun];
    if (t.job.plan.base(true, false))
      unpack<Tile::kB>(t.base_at(place), t.base_f16(), z);
    else
      unpack<Tile::kO>(t.other_at(place), t.other_f16(), z);
    KD_UNROLL for (int i = 0; i < kRun; i++) g[i] =
        exp2_of_product(z[i] - student_top, r.c, 0.f) * ((A * t.held.xi[at + i] + C) + rest);
  }
};
template <class Tile> KD_DEVICE void emit_whole(const Tile &t, const TileGradient &x) {
  const Reference<float> r = t.reference(x.part);
  const WholeGradient<typename Tile::Family> gradient(t, x.factors, r);
  t.whole_chunks([&](int j, int place) {
    float g[kRun];
    gradient(t, place, j * kRun, g);
    if (t.job.hard) add_hard(t, place, x, g);
    put_whole(t.at.grad + int64_t(t.class_of(place)) * size_of(t.grad_dtype()), t.grad_dtype(), g);
  });
}

// The gradient of a chunk that is not whole, from its logits again.
KD_DEVICE float gradient_of(const Plain::Kept<float> &k, const Factors &f, bool) {
  return f.C * k.e + f.A * k.em;
}
// lone: a class that the teacher masks has et = -e and a factor of its own, where the student is the base.
KD_DEVICE float gradient_of(const Tilted::Kept<float> &k, const Factors &f, bool lone) {
  return lone && k.et == -k.e ? f.lone * k.e : f.C * k.e + f.A * k.em + f.B * k.et;
}
template <class Tile>
KD_DEVICE void gradient_again(const Tile &t, int place, const TileGradient &x, float (&g)[kRun]) {
  const Factors &f = x.factors;
  if constexpr (Tile::Family::kTwice) {
    const RowReference<float> at = row_reference(t, x.part);
    const float rest = left_over(f.A, f.C, f.end);
    SecondSums<float> unused;
    mix_other(t, place, at, unused,
              [&](int i, const Second<float> &k) { g[i] = k.q * ((f.A * k.xi + f.C) + rest); });
  } else {
    const Reference<float> r = t.reference(x.part);
    const bool lone = t.job.plan.base(true, false);
    FirstSums<typename Tile::Family, float> unused;
    sweep_other(t, place, r, unused, [&](int i, const auto &k) { g[i] = gradient_of(k, f, lone); });
  }
}
template <class Tile> KD_DEVICE void emit(const Tile &t, const TileGradient &x) {
  emit_whole(t, x);
  const bool empty = x.part.empty();
  t.other_chunks([&](int place) {
    float g[kRun];
    if (empty) {
      KD_UNROLL for (int i = 0; i < kRun; i++) g[i] = 0 * x.factors.C;
    } else {
      gradient_again(t, place, x, g);
    }
    if (t.job.hard) add_hard(t, place, x, g);
    if (t.by_class()) finish_classes(t, place, g);
    put(t.at.grad, t.class_of(place), t.vocab(), t.job.call.student_dtype, g);
  });
}

}  // namespace KD_LEVEL
}  // namespace kd

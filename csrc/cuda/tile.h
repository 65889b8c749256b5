// A tile: the classes of a row that a team of threads takes at a time, in shared memory, and what a thread
// holds of them in registers.
//
// Threads take chunks of 8 classes, chunk c of a row beginning at class 8 c - offset, where the offset makes
// chunks lie on 16 bytes; of the first and the last chunk some classes may be outside of the row, and are
// masked classes. A tile is a block of row/: it has a reference of its own, which the team agrees on before
// any exponential is taken. What its gradient is made of stays in registers until the row is closed; e is
// cheap to compute again. What is summed in a thread and over its warp is fp32, in a fixed order; everything
// above is fp64.
//
// A chunk is *whole* where it lies inside of the row, its gradient on 16 bytes, and no class of the tile asks
// for more than the fast step: of those the registers hold what is kept, which takes unrolled loops. The
// others (a row's first and last chunk; masks) are computed again where they are emitted, in rolled loops: a
// tenth of the code, for a few classes, or few rows.
#pragma once
#include "logits.h"
#include "team.h"

namespace kd {
namespace KD_LEVEL {

// What a thread holds of n classes, by family, and their gradient from e and that. The warp that closes a row
// needs its registers meanwhile: they go to the shelf, a place in shared memory, and come back.
template <class Family, int n> struct Held;
template <int n> struct Held<Plain, n> {
  float em[n];
  KD_DEVICE void put(int i, const Plain::Kept<float> &k) { em[i] = k.em; }
  KD_DEVICE float gradient(int i, float e, const Factors &f) const { return f.C * e + f.A * em[i]; }
  KD_DEVICE void shelve(float *shelf, int lane) const {
    KD_UNROLL for (int i = 0; i < n; i++) shelf[i * 32 + lane] = em[i];
  }
  KD_DEVICE void unshelve(const float *shelf, int lane) {
    KD_UNROLL for (int i = 0; i < n; i++) em[i] = shelf[i * 32 + lane];
  }
};
template <int n> struct Held<Tilted, n> {
  float em[n], et[n];
  KD_DEVICE void put(int i, const Tilted::Kept<float> &k) {
    em[i] = k.em;
    et[i] = k.et;
  }
  KD_DEVICE float gradient(int i, float e, const Factors &f) const {
    const float g = f.C * e + f.A * em[i];
    return g + f.B * et[i];
  }
  KD_DEVICE void shelve(float *shelf, int lane) const {
    KD_UNROLL for (int i = 0; i < n; i++) {
      shelf[i * 32 + lane] = em[i];
      shelf[(n + i) * 32 + lane] = et[i];
    }
  }
  KD_DEVICE void unshelve(const float *shelf, int lane) {
    KD_UNROLL for (int i = 0; i < n; i++) {
      em[i] = shelf[i * 32 + lane];
      et[i] = shelf[(n + i) * 32 + lane];
    }
  }
};
// xi, which the second sweep finds; the first one's share is computed again.
template <int n> struct Held<Mixture, n> {
  float xi[n];
  KD_DEVICE void put(int, const Mixture::Kept<float> &) {}
  KD_DEVICE void shelve(float *shelf, int lane) const {
    KD_UNROLL for (int i = 0; i < n; i++) shelf[i * 32 + lane] = xi[i];
  }
  KD_DEVICE void unshelve(const float *shelf, int lane) {
    KD_UNROLL for (int i = 0; i < n; i++) xi[i] = shelf[i * 32 + lane];
  }
};

// The base's logits have kB bytes, the other's kO.
template <class G_, class Family_, int kB_, int kO_> struct Tile {
  using G = G_;
  using Family = Family_;
  static constexpr int kB = kB_, kO = kO_;
  // 16-bit logits have differences without rounding errors
  static constexpr bool kCarry = kB == 4 || kO == 4;
  static constexpr int kBytes = G::kTile * kRun * (kB + kO);
  using T = Team<G>;

  const Job &job;
  Scratch<G> &scratch;
  const RowAt &at;
  int first = 0, count = 0;              // its chunks of the row
  int whole_from = 0, whole_to = 0;      // those that are whole, from the first on
  int slot = 0;                          // in shared memory: the base's logits, then the other's
  Held<Family, G::kChunks * kRun> held;  // of its whole chunks

  KD_DEVICE Tile(const Job &j, Scratch<G> &s, const RowAt &a) : job(j), scratch(s), at(a) {}

  // Chunks [from, end) of the row, or as many as a tile takes.
  KD_DEVICE void turn_to(int from, int end, char *logits) {
    first = from;
    slot = int(logits - gpu::shared());
    count = end - from < G::kTile ? end - from : G::kTile;
  }
  KD_DEVICE void allow_whole(bool yes) {
    yes &= !(job.call.grad &&
             (uintptr_t)(at.grad + int64_t(class_of(0)) * size_of(job.call.student_dtype)) % 16);
    whole_from = first == 0 && at.offset > 0;
    // from here: asked for again at the end of a row
    whole_to = !yes ? 0 : class_of(int(gpu::from_here(int64_t(count)))) > vocab() ? count - 1 : count;
  }

  KD_DEVICE int32_t base_dtype() const {
    return job.plan.base(job.call.student_dtype, job.call.teacher_dtype);
  }
  KD_DEVICE int32_t other_dtype() const {
    return job.plan.other(job.call.student_dtype, job.call.teacher_dtype);
  }
  KD_DEVICE bool base_f16() const { return kB == 2 && base_dtype() == KD_F16; }
  KD_DEVICE bool other_f16() const { return kO == 2 && other_dtype() == KD_F16; }
  KD_DEVICE const char *base_row() const { return job.plan.base(at.student, at.teacher); }
  KD_DEVICE const char *other_row() const { return job.plan.other(at.student, at.teacher); }
  KD_DEVICE char *base_at(int place) const { return gpu::shared() + slot + place * kRun * kB; }
  KD_DEVICE char *other_at(int place) const {
    return gpu::shared() + slot + (G::kTile * kB + place * kO) * kRun;
  }
  KD_DEVICE int vocab() const { return int(job.call.vocab); }
  KD_DEVICE int class_of(int place) const { return (first + place) * kRun - at.offset; }
  KD_DEVICE bool in_row(int i) const { return i >= 0 && i < vocab(); }
  KD_DEVICE bool inside(int place) const { return class_of(place) >= 0 && class_of(place) + kRun <= vocab(); }
  // what the template knows of the student's dtype
  KD_DEVICE int32_t grad_dtype() const {
    const int bytes = kB == kO ? kO : job.plan.base(kB, kO);
    return bytes == 4 ? KD_F32 : job.call.student_dtype;
  }
  // each class of the gradient has a factor or a summand of its own: none is emitted as whole
  KD_DEVICE bool by_class() const { return job.smooth || job.transformed; }

  // This thread's whole chunks, body(j, place) with j known when compiled; the others; all.
  template <class Body> KD_DEVICE void whole_chunks(Body body) const {
    KD_UNROLL for (int j = 0; j < G::kChunks; j++) {
      const int place = j * G::kThreads + T::thread();
      if (place >= whole_from && place < whole_to) body(j, place);
    }
  }
  template <class Body> KD_DEVICE void other_chunks(Body body) const {
    KD_ROLLED for (int place = T::thread(); place < count;
                   place += G::kThreads) if (place < whole_from || place >= whole_to) body(place);
  }
  template <class Body> KD_DEVICE void chunks(Body body) const {
    KD_ROLLED for (int place = T::thread(); place < count; place += G::kThreads) body(place);
  }

  // 8 classes as numbers; those outside of the row are masked.
  KD_DEVICE void mask(int place, float (&x)[kRun]) const {
    if (inside(place)) return;
    KD_UNROLL for (int i = 0; i < kRun; i++) if (!in_row(class_of(place) + i)) x[i] = -INFINITY;
  }
  KD_DEVICE void load_base(int place, float (&b)[kRun]) const {
    unpack<kB>(base_at(place), base_f16(), b);
    mask(place, b);
  }
  KD_DEVICE void load_other(int place, float (&o)[kRun]) const {
    unpack<kO>(other_at(place), other_f16(), o);
    mask(place, o);
  }
  KD_DEVICE void load_student(int place, float (&z)[kRun]) const {
    if (job.plan.base(true, false))
      load_base(place, z);
    else
      load_other(place, z);
  }
  KD_DEVICE void load_whole(int place, float (&b)[kRun], float (&o)[kRun]) const {
    unpack<kB>(base_at(place), base_f16(), b);
    unpack<kO>(other_at(place), other_f16(), o);
  }

  KD_DEVICE Reference<float> reference(const Part &p) const {
    const float ref = float(p.ref), low = kCarry ? float(p.ref - ref) : 0;
    return {float(p.top),
            ref,
            low,
            job.c,
            kCarry ? job.c_low : 0,
            job.tilt,
            0,  // the floor: that of the hardware
            job.reach,
            job.plan.base(false, true)};
  }

  // Sums of a thread to those of its warp, at scratch.sums from `from` on; and those of all warps.
  template <int N> KD_DEVICE void publish(int from, float (&x)[N]) const {
    gpu::warp_sum(x);
    if (T::lane() == 0) KD_UNROLL for (int i = 0; i < N; i++) scratch.sums[T::warp()][from + i] = x[i];
  }
  template <int N> KD_DEVICE void collect(int from, double (&x)[N]) const {  // by a warp
    KD_UNROLL for (int i = 0; i < N; i++) x[i] =
        T::lane() < G::kWarps ? scratch.sums[T::lane()][from + i] : 0;
    gpu::warp_sum(x);
  }
};

}  // namespace KD_LEVEL
}  // namespace kd

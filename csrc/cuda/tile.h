// A tile: the classes of a row that a team of threads takes at a time, from shared memory to sums, and from
// coefficients to a gradient.
//
// Threads take chunks of 8 classes, chunk c of a row beginning at class 8 c - offset, where the offset makes
// chunks lie on 16 bytes; of the first and the last chunk some classes may be outside of the row, and are
// masked classes. A tile is a block of row.h: it has its own references, which the team agrees on before any
// exponential is taken, and leaves em (and et) in registers until the row is closed; e is cheap to compute
// again. What is summed in a thread and over its warp is fp32, in a fixed order; everything above is fp64.
//
// Logits with a transform (math/transform.h) are transformed where they lie, by the thread that has copied
// them, before anything else looks at them: as fp32, whatever they come as, so that all that follows is what
// rows of fp32 get.
#pragma once
#include "number.h"
#include "../math/transform.h"
#include "../row.h"

namespace kd {
namespace KD_LEVEL {

// Statistics of a tile: also the first classes that have the largest logits of the base and of the other.
struct TileStats : StatPart { double first_b = 0, first_o = 0; };

constexpr int kRun = 8;   // classes of a chunk: 16 bytes at 2 bytes each, 32 at 4
constexpr int kLost = 3;  // Part::care of a tile that only careful.h can take
// the loss of a row that is still to be computed: a nan that no arithmetic returns
constexpr int64_t kLostMark = 0x7ff8000000010571;
// of 8 bytes, between blocks
constexpr int kPartWords = sizeof(Part) / 8, kWords = kPartWords + sizeof(SmoothPart) / 8;
constexpr int kStatWords = sizeof(TileStats) / 8;  // where entropies are asked for
// of a part after the second sweep of the mixture family; of a row's exchanges
constexpr int kMixedWords = 4, kCounters = 4;

// How a kernel is laid out: kTeams rows to a block, kThreads threads to a row's tile, kChunks chunks to a
// thread.
template <int kThreads_, int kChunks_, int kTeams_ = 1> struct Geometry {
  static constexpr int kThreads = kThreads_, kChunks = kChunks_, kTeams = kTeams_, kWarps = kThreads / 32,
                       kTile = kThreads * kChunks;
  static_assert(kTeams == 1 || kThreads == 32,
                "several rows to a block: a warp to each, which needs no barrier of the block");
};

// A call, as the kernels get it.
struct Job {
  kd_call call;
  Plan plan;
  float c, c_low, tilt, reach;  // plan's, as the tiles take them
  int32_t parts, tiles;         // blocks to a row; the most tiles to a block
  int32_t stages, team_bytes;   // of logits in shared memory; shared memory of a team
  int32_t hard, all;            // the hard term is asked for; every row is careful.h's
  int32_t smooth, transformed;  // label smoothing is; one of the rows has a transform
  int32_t entropies;            // asked for: statistics, or the cross entropy
  Transform<float> student, teacher;
  // [1 + kCounters rows]: the next (row, part); arrivals at a row's exchanges. Zero at launch
  uint32_t *tickets;
  // [rows][parts * tiles][kWords], then, mixture family, [kMixedWords], then, statistics, [kStatWords]
  double *state;
  Mixed<float> mix;  // plan's
};

// A row, as one thread finds it out for all: where it lies, and what it asks for.
struct RowAt {
  const char *student, *teacher;
  char *grad;
  int offset, chunks;
  double weight;
  // -1 for one outside of the vocabulary, whose logit is nan
  int label;
  float label_logit;
};
KD_DEVICE int64_t element_of(const kd_call &c, const int64_t *stride, int64_t row) {
  return row < c.inner ? row * stride[1] : row / c.inner * stride[0] + row % c.inner * stride[1];
}
KD_DEVICE int size_of(int32_t dtype) { return dtype == KD_F32 ? 4 : 2; }
KD_DEVICE RowAt locate(const Job &job, int64_t row) {
  const kd_call &c = job.call;
  RowAt at{};
  const int zs = size_of(c.student_dtype), vs = size_of(c.teacher_dtype);
  at.student = (const char *)c.student + element_of(c, c.student_stride, row) * zs;
  at.teacher = (const char *)c.teacher + element_of(c, c.teacher_stride, row) * vs;
  if (c.grad) at.grad = (char *)c.grad + element_of(c, c.grad_stride, row) * zs;
  at.offset = vs < zs ? int((uintptr_t)at.teacher % 16) / vs : int((uintptr_t)at.student % 16) / zs;
  at.chunks = (at.offset + int(c.vocab) + kRun - 1) / kRun;
  return at;
}

// Of a tile. lone: of e where the teacher masks the class. less: what the student's exponential of emit_whole
// is to be multiplied by (kMixed). end: Coefficients::end.
struct Factors { float A, B, C, lone, hard, less, end; };

// What the threads of a team tell each other.
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

// The lanes of a warp as who closes a row (row.h).
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

// ---------------------------------------------------------------- logits
template <int kBytes> KD_DEVICE float element(const char *p, int64_t i, bool f16) {
  if constexpr (kBytes == 4) return ((const float *)p)[i];
  const uint32_t u = ((const uint16_t *)p)[i];
  return f16 ? gpu::from_f16(u) : gpu::from_bf16(u);
}
KD_DEVICE float element(const char *p, int64_t i, int32_t dtype) {
  return dtype == KD_F32 ? element<4>(p, i, false) : element<2>(p, i, dtype == KD_F16);
}

// A chunk of a row to its place in shared memory; visible to this thread after copy_wait, to others after a
// barrier besides.
template <int kBytes> KD_DEVICE void fetch(char *to, const char *row, int first, int vocab) {
  const char *from = row + int64_t(first) * kBytes;
  if (first >= 0 && first + kRun <= vocab && (uintptr_t)from % 16 == 0) {
    KD_UNROLL for (int i = 0; i < kRun * kBytes; i += 16) gpu::copy_async(to + i, from + i);
    return;
  }
  // edges, and rows that lie otherwise than the chunks: class by class
  KD_UNROLL for (int i = 0; i < kRun; i++) {
    if (first + i < 0 || first + i >= vocab) continue;
    if (kBytes == 4)
      ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
    else
      ((uint16_t *)to)[i] = ((const uint16_t *)from)[i];
  }
}

template <int kBytes> KD_DEVICE void unpack(const char *p, bool f16, float (&x)[kRun]) {
  if constexpr (kBytes == 4) {
    const gpu::Word4 a = gpu::load16(p), b = gpu::load16(p + 16);
    KD_UNROLL for (int i = 0; i < 4; i++) {
      x[i] = from_bits((int32_t)a.x[i]);
      x[4 + i] = from_bits((int32_t)b.x[i]);
    }
  } else {
    const gpu::Word4 w = gpu::load16(p);
    if (f16) KD_UNROLL for (int i = 0; i < 4; i++) {
        x[2 * i] = gpu::from_f16(w.x[i] & 0xffff);
        x[2 * i + 1] = gpu::from_f16(w.x[i] >> 16);
      }
    else
      KD_UNROLL for (int i = 0; i < 4; i++) {
        x[2 * i] = gpu::from_bf16(w.x[i] & 0xffff);
        x[2 * i + 1] = gpu::from_bf16(w.x[i] >> 16);
      }
  }
}

// The largest of many chunks, 16-bit logits two at a time as they lie.
template <int kBytes> struct Largest {
  float value = -INFINITY;
  uint32_t pair;
  bool f16;
  explicit KD_DEVICE Largest(bool is_f16) : pair(is_f16 ? 0xfc00fc00 : 0xff80ff80), f16(is_f16) {}
  KD_DEVICE void add(const char *p) {
    if constexpr (kBytes == 4) {
      float x[kRun];
      unpack<4>(p, false, x);
      KD_UNROLL for (int i = 0; i < kRun; i++) value = gpu::largest(value, x[i]);
    } else {
      const gpu::Word4 w = gpu::load16(p);
      if (f16)
        KD_UNROLL for (int i = 0; i < 4; i++) pair = gpu::largest_f16_pair(pair, w.x[i]);
      else
        KD_UNROLL for (int i = 0; i < 4; i++) pair = gpu::largest_bf16_pair(pair, w.x[i]);
    }
  }
  KD_DEVICE float get() const {
    if (kBytes == 4) return value;
    const float a = f16 ? gpu::from_f16(pair & 0xffff) : gpu::from_bf16(pair & 0xffff),
                b = f16 ? gpu::from_f16(pair >> 16) : gpu::from_bf16(pair >> 16);
    return gpu::largest(value, gpu::largest(a, b));
  }
};

KD_DEVICE gpu::Word4 pack(int32_t dtype, const float (&g)[kRun]) {
  gpu::Word4 w;
  if (dtype == KD_F16)
    KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = gpu::to_f16_pair(g[2 * i], g[2 * i + 1]);
  else
    KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = gpu::to_bf16_pair(g[2 * i], g[2 * i + 1]);
  return w;
}
// 8 classes of a gradient, on 16 bytes.
KD_DEVICE void put_whole(char *to, int32_t dtype, const float (&g)[kRun]) {
  if (dtype != KD_F32) return gpu::store_streaming(to, pack(dtype, g));
  KD_UNROLL for (int h = 0; h < 2; h++) {
    gpu::Word4 w;
    KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = (uint32_t)bits(g[4 * h + i]);
    gpu::store_streaming(to + 16 * h, w);
  }
}
// Wherever they lie; those outside of the row are not written.
template <class Index>
KD_DEVICE void put(char *row, Index first, Index vocab, int32_t dtype, const float (&g)[kRun]) {
  char *to = row + int64_t(first) * size_of(dtype);
  if (first >= 0 && first + kRun <= vocab && (uintptr_t)to % 16 == 0) return put_whole(to, dtype, g);
  const gpu::Word4 w = pack(dtype, g);
  KD_UNROLL for (int i = 0; i < kRun; i++) {
    if (first + i < 0 || first + i >= vocab) continue;
    if (dtype == KD_F32)
      ((float *)to)[i] = g[i];
    else
      ((uint16_t *)to)[i] = uint16_t(i % 2 ? w.x[i / 2] >> 16 : w.x[i / 2] & 0xffff);
  }
}

KD_DEVICE void put_one(char *row, int64_t i, int32_t dtype, float g) {
  if (dtype == KD_F32)
    ((float *)row)[i] = g;
  else
    ((uint16_t *)row)[i] = uint16_t(dtype == KD_F16 ? gpu::to_f16_pair(g, 0) : gpu::to_bf16_pair(g, 0));
}

// Zeros over [from, to) of the gradients' rows, by teams of `threads` threads; to < 0: to their ends.
KD_DEVICE void put_zeros(const Job &job, const RowAt &at, int64_t from, int64_t to, int threads) {
  const int thread = int(unsigned(gpu::from_here(int64_t(gpu::thread()))) % threads);
  const kd_call &c = job.call;
  if (!c.grad) return;
  for (int64_t i = from + thread; i < (to < 0 ? c.grad_width : to); i += threads)
    if (c.student_dtype == KD_F32)
      ((float *)at.grad)[i] = 0;
    else
      ((uint16_t *)at.grad)[i] = 0;
}

// From where emit_whole takes the student's exponentials (kMixed), near their largest: the base's top, moved
// by the row's shift.
template <class G> KD_DEVICE float top_of_student(float top, const Scratch<G> &scratch, const Job &job) {
  return job.plan.student_base ? top : top + scratch.ref_high;
}

// What a whole chunk of the mixture family is, found out for the whole of it: a branch within would keep its
// classes from being computed side by side. kOfNear: no |y| of a warp's is above Mixed::near; else kOfEven
// has no moves (JSD's weights), kOfSkewed has some.
enum MixKind : int { kOfTvd, kOfReverse, kOfNear, kOfEven, kOfSkewed };
template <MixKind kMix> struct MixedAs : Mixed<float> {
  static constexpr bool tvd = kMix == kOfTvd;
  explicit KD_DEVICE MixedAs(const Mixed<float> &m) : Mixed<float>(m) {
    if (kMix == kOfReverse) l = 0;
    if (kMix != kOfSkewed) {
      share_weight = 0;
      cancels = false;
    }
  }
};
template <MixKind kMix> KD_DEVICE MixedTerm<float> mixed_class(float y, int32_t, const MixedAs<kMix> &mix) {
  return kMix == kOfNear ? mixed_near(y, mix) : mixed_term(y * float(kLn2), expm1_psi(y), mix);
}

// ---------------------------------------------------------------- the tile
// Shape kPlain (KL, cross entropy, T = inf), kTilted, or kMixed (TVD among them), whose tiles are measured
// and then swept again, from the row's own shift: xi is kept where em would be. The base's logits have kB
// bytes, the other's kO.
//
// A chunk is *whole* where it lies inside of the row, its gradient on 16 bytes, and no class of the tile asks
// for more than the fast step: of those em and et stay in registers, which takes unrolled loops. The others
// (a row's first and last chunk; masks; T = inf) are computed again where they are emitted, in rolled loops:
// a tenth of the code, for a few classes, or few rows.
template <class G, Shape kShape, int kB, int kO> struct Tile {
  // 16-bit logits have differences without rounding errors
  static constexpr bool kCarry = kB == 4 || kO == 4;
  static constexpr int kBytes = G::kTile * kRun * (kB + kO);
  using T = Team<G>;

  const Job &job;
  Scratch<G> &scratch;
  const RowAt &at;
  int first = 0, count = 0;          // its chunks of the row
  int whole_from = 0, whole_to = 0;  // those that are whole, from the first on
  int slot = 0;                      // in shared memory: the base's logits, then the other's
  // of whole chunks; no more than that is ever read. kMixed: xi
  float em[G::kChunks * kRun], et[kShape == kTilted ? G::kChunks * kRun : 1];

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
    return job.plan.student_base ? job.call.student_dtype : job.call.teacher_dtype;
  }
  KD_DEVICE int32_t other_dtype() const {
    return job.plan.student_base ? job.call.teacher_dtype : job.call.student_dtype;
  }
  KD_DEVICE bool base_f16() const { return kB == 2 && base_dtype() == KD_F16; }
  KD_DEVICE bool other_f16() const { return kO == 2 && other_dtype() == KD_F16; }
  KD_DEVICE const char *base_row() const { return job.plan.student_base ? at.student : at.teacher; }
  KD_DEVICE const char *other_row() const { return job.plan.student_base ? at.teacher : at.student; }
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
    const int bytes = kShape == kPlain || kB == kO ? kO : job.plan.student_base ? kB : kO;
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
  KD_DEVICE void load_side(bool student, int place, float (&x)[kRun]) const {
    if (job.plan.student_base == student)
      load_base(place, x);
    else
      load_other(place, x);
  }
  KD_DEVICE void load_student(int place, float (&z)[kRun]) const { load_side(true, place, z); }

  // This thread's chunks, on their way to the slot. A chunk of 16-bit logits that will be transformed goes to
  // the second half of its place.
  KD_DEVICE void fetch_own() const {
    if constexpr (kB == 4 && kO == 4)
      if (job.transformed) {
        const auto bring = [&](char *to, const char *row, int32_t dtype, int from) {
          if (dtype == KD_F32)
            fetch<4>(to, row, from, vocab());
          else
            fetch<2>(to + 2 * kRun, row, from, vocab());
        };
        return chunks([&](int place) {
          bring(base_at(place), base_row(), base_dtype(), class_of(place));
          bring(other_at(place), other_row(), other_dtype(), class_of(place));
        });
      }
    chunks([&](int place) {
      fetch<kB>(base_at(place), base_row(), class_of(place), vocab());
      fetch<kO>(other_at(place), other_row(), class_of(place), vocab());
    });
  }

  // What fetch_own has brought.
  KD_DEVICE void transform_own() const {
    if constexpr (kB == 4 && kO == 4)
      if (job.transformed) {
        const auto with = [&](char *p, int32_t dtype, const Transform<float> &t) {
          float x[kRun];
          if (dtype == KD_F32)
            unpack<4>(p, false, x);
          else
            unpack<2>(p + 2 * kRun, dtype == KD_F16, x);
          KD_UNROLL for (int h = 0; h < 2; h++) {
            gpu::Word4 w;
            KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = (uint32_t)bits(transformed(x[4 * h + i], t));
            gpu::store16(p + 16 * h, w);
          }
        };
        chunks([&](int place) {
          with(base_at(place), base_dtype(), job.plan.student_base ? job.student : job.teacher);
          with(other_at(place), other_dtype(), job.plan.student_base ? job.teacher : job.student);
        });
      }
  }

  template <int kSize, class At> KD_DEVICE float largest_own(At at_place, bool f16) const {
    Largest<kSize> top(f16);
    chunks([&](int place) {
      if (inside(place)) return top.add(at_place(place));
      float x[kRun];
      unpack<kSize>(at_place(place), f16, x);
      mask(place, x);
      KD_UNROLL for (int i = 0; i < kRun; i++) top.value = gpu::largest(top.value, x[i]);
    });
    return top.get();
  }
  KD_DEVICE float largest_base() const {
    return largest_own<kB>([&](int place) { return base_at(place); }, base_f16());
  }
  KD_DEVICE float largest_other() const {
    return largest_own<kO>([&](int place) { return other_at(place); }, other_f16());
  }
  static KD_DEVICE float largest_of(const float (&x)[G::kWarps]) {
    float top = x[0];
    KD_UNROLL for (int i = 1; i < G::kWarps; i++) top = gpu::largest(top, x[i]);
    return top;
  }

  // Where differences are measured from: near their mean under the base, as cpu/block.h's find_references has
  // it: the difference at the largest class, which alone decides where it dominates, and those of 64 classes
  // spread over the tile. `own` is this thread's largest.
  KD_DEVICE float find_reference(float own, float top) {
    constexpr int kSamples = 64;
    int holder = 0;
    KD_UNROLL for (int i = G::kWarps - 1; i >= 0; i--) if (scratch.top[i] == top) holder = i;
    if (T::warp() == holder && gpu::warp_first(own == top) == T::lane()) {
      float found = 0;
      bool hit = false;
      KD_ROLLED for (int place = T::thread(); place < count && !hit; place += G::kThreads) {
        float b[kRun], o[kRun];
        load_base(place, b);
        load_other(place, o);
        KD_UNROLL for (int i = kRun - 1; i >= 0; i--) if (b[i] == top) {
          found = o[i] - b[i];
          hit = true;
        }
      }
      scratch.at_top = found;
    }
    if (T::warp() == 0) {
      float sums[2]{};
      KD_ROLLED for (int i = int(gpu::from_here(int64_t(T::lane()))); i < kSamples; i += 32) {
        const int place = int(unsigned(count * i) / kSamples), l = i & (kRun - 1);
        if (!in_row(class_of(place) + l)) continue;
        const float b = element<kB>(base_at(place), l, base_f16()),
                    x = element<kO>(other_at(place), l, other_f16()) - b;
        const float w = gpu::exp2((b - top) * job.c);
        if (x - x == 0 && w > 0) {
          sums[0] += w;
          sums[1] += w * x;
        }
      }
      gpu::warp_sum(sums);
      if (T::lane() == 0) {
        scratch.weight = sums[0];
        scratch.mean = sums[1];
      }
    }
    T::sync();
    const float x = scratch.at_top, weight = scratch.weight, mean = scratch.mean;
    if (!(x - x == 0)) return weight > 0 ? mean / weight : 0;
    // classes that one of the sample stands for
    const float each = float(count) * (kRun / float(kSamples));
    return x + each * (mean - weight * x) / (1 + each * weight);
  }

  KD_DEVICE References<float> references(const Part &p) const {
    const float ref = float(p.ref), low = kCarry ? float(p.ref - ref) : 0;
    return {float(p.top),          ref, low, job.c, kCarry ? job.c_low : 0, job.tilt, 0, job.reach,
            !job.plan.student_base};
  }

  // e, em and et of a chunk that is not whole.
  template <class Keep>
  KD_DEVICE void step_other(int place, const References<float> &r, Sums<float> &s, int32_t &wild,
                            Keep keep) const {
    float b[kRun], o[kRun];
    load_base(place, b);
    load_other(place, o);
    KD_UNROLL for (int i = 0; i < kRun; i++) { keep(i, step<kShape, kCarry, true>(b[i], o[i], r, s, wild)); }
  }
  KD_DEVICE void sweep_whole(const References<float> &r, Sums<float> &s, int32_t &wild) {  // em and et stay
    whole_chunks([&](int j, int place) {
      float b[kRun], o[kRun];
      unpack<kB>(base_at(place), base_f16(), b);
      unpack<kO>(other_at(place), other_f16(), o);
      KD_UNROLL for (int i = 0; i < kRun; i++) {
        const Kept<float> k = step<kShape, kCarry, false>(b[i], o[i], r, s, wild);
        if (kShape != kMixed) em[j * kRun + i] = k.em;
        if (kShape == kTilted) et[j * kRun + i] = k.et;
      }
    });
  }

  // ---- the second sweep of the mixture family
  KD_DEVICE References<float> mixed_references(const Part &p) const {
    return {float(p.top), scratch.ref_high, scratch.ref_low, job.c, kCarry ? job.c_low : 0, 0, 0, job.reach,
            false};
  }
  template <bool kMask, class Mix>
  KD_DEVICE Kept<float> step_again(float b, float o, const References<float> &r, const Mix &mix, float rest,
                                   Sums<float> &s, int32_t &wild) const {
    const float a = (b - r.top) * r.c;
    return step_mixed<kCarry, kMask>(b, o, r, mix, rest, gpu::exp2(a),
                                     gpu::exp2(a + deviation<kCarry>(b, o, r, rest)), s, wild);
  }
  template <class Keep>
  KD_DEVICE void mix_other(int place, const References<float> &r, const Mixed<float> &mix, Sums<float> &s,
                           int32_t &wild, Keep keep) const {
    float b[kRun], o[kRun];
    load_base(place, b);
    load_other(place, o);
    KD_UNROLL for (int i = 0; i < kRun; i++)
        keep(i, step_again<true>(b[i], o[i], r, mix, scratch.ref_rest, s, wild));
  }
  KD_DEVICE void load_whole(int place, float (&b)[kRun], float (&o)[kRun]) const {
    unpack<kB>(base_at(place), base_f16(), b);
    unpack<kO>(other_at(place), other_f16(), o);
  }
  // The largest |y| of a chunk, whose logits the first sweep has seen to be finite.
  KD_DEVICE float farthest(const float (&b)[kRun], const float (&o)[kRun], const References<float> &r) const {
    float most = 0;
    KD_UNROLL for (int i = 0; i < kRun; i++) most =
        gpu::largest(most, std::fabs(deviation<kCarry>(b[i], o[i], r, scratch.ref_rest)));
    return most;
  }
  // q and xi of a chunk that no mask is in, to keep(i, .).
  template <MixKind kMix, class Keep>
  KD_DEVICE void mix_chunk(const float (&b)[kRun], const float (&o)[kRun], const References<float> &r,
                           const Mixed<float> &all, Sums<float> &s, Keep keep) const {
    const MixedAs<kMix> mix(all);
    int32_t wild = 0;  // farthest knows
    KD_UNROLL for (int i = 0; i < kRun; i++)
        keep(i, step_again<false>(b[i], o[i], r, mix, scratch.ref_rest, s, wild));
  }
  // near: that no |y| of the warp's is above Mixed::near
  template <class Keep>
  KD_DEVICE void mix_chunk(bool near, const float (&b)[kRun], const float (&o)[kRun],
                           const References<float> &r, const Mixed<float> &all, Sums<float> &s,
                           Keep keep) const {
    if (near)
      mix_chunk<kOfNear>(b, o, r, all, s, keep);
    else if (all.tvd)
      mix_chunk<kOfTvd>(b, o, r, all, s, keep);
    else if (all.l == 0)
      mix_chunk<kOfReverse>(b, o, r, all, s, keep);
    else if (!all.cancels && all.share_weight == 0)
      mix_chunk<kOfEven>(b, o, r, all, s, keep);
    else
      mix_chunk<kOfSkewed>(b, o, r, all, s, keep);
  }
  // Chunk by chunk in a rolled loop, which moves those before along: unrolled, its five kinds would be more
  // code than a multiprocessor keeps at hand.
  KD_DEVICE void mix_whole(const References<float> &r, Sums<float> &s, int32_t &wild) {
    const bool general = !job.mix.tvd && job.mix.l != 0;
    float most = 0;
    KD_ROLLED for (int j = 0; j < G::kChunks; j++) {
      KD_UNROLL for (int i = 0; i + kRun < G::kChunks * kRun; i++) em[i] = em[i + kRun];
      const int place = j * G::kThreads + T::thread();
      const bool whole = place >= whole_from && place < whole_to;
      float b[kRun], o[kRun];
      float own = 0;
      if (whole) {
        load_whole(place, b, o);
        own = farthest(b, o, r);
        most = gpu::largest(most, own);
      }
      const bool near = general && !gpu::warp_any(!(own <= job.mix.near));  // every lane is asked
      if (!whole) continue;
      // xi to the last that stay
      mix_chunk(near, b, o, r, job.mix, s,
                [&](int i, const Kept<float> &k) { em[(G::kChunks - 1) * kRun + i] = k.em; });
    }
    const int32_t far = bits(most);
    wild = far > wild ? far : wild;
  }

  KD_DEVICE void sweep_hard(float top, float (&x)[2]) const {
    chunks([&](int place) {
      float z[kRun];
      load_student(place, z);
      KD_UNROLL for (int i = 0; i < kRun; i++) step_hard(z[i], top, x[0], x[1]);
    });
  }

  // How far the classes that are there lie below the largest, and how many they are.
  KD_DEVICE void sweep_smooth(float top, float (&x)[2]) const {
    chunks([&](int place) {
      float z[kRun];
      load_student(place, z);
      KD_UNROLL for (int i = 0; i < kRun; i++) if (z[i] > -INFINITY) {
        x[0] += top - z[i];
        x[1] += 1;
      }
    });
  }

  // For the statistics: what step sums for them, and, negative, the first classes with the largest logits.
  // Before em and et are in registers.
  KD_DEVICE void sweep_stats(const References<float> &r, float top_o) {
    Sums<float> s;
    int32_t wild = 0;
    float first_b = INFINITY, first_o = INFINITY;
    chunks([&](int place) {
      float b[kRun], o[kRun];
      load_base(place, b);
      load_other(place, o);
      KD_UNROLL for (int i = 0; i < kRun; i++) {
        step<kShape, kCarry, true, kBothLogs>(b[i], o[i], r, s, wild);
        const float here = float(class_of(place) + i);
        if (b[i] == r.top && here < first_b) first_b = here;
        if (o[i] == top_o && here < first_o) first_o = here;
      }
    });
    float largest[2] = {s.others, s.ties}, logs[2] = {s.log_b, s.log_o};
    share(5, largest);
    share(12, logs);
    first_b = gpu::warp_largest(-first_b);
    first_o = gpu::warp_largest(-first_o);
    if (T::lane() == 0) {
      scratch.sums[T::warp()][14] = first_b;
      scratch.sums[T::warp()][15] = first_o;
    }
    if (T::thread() == 0) scratch.top_o = top_o;
  }
  KD_DEVICE void collect_stats(TileStats *stats) const {  // by a warp
    double largest[2], logs[2];
    collect(5, largest);
    collect(12, logs);
    const int w = T::lane() < G::kWarps ? T::lane() : 0;
    const float first_b = gpu::warp_largest(scratch.sums[w][14]),
                first_o = gpu::warp_largest(scratch.sums[w][15]);
    if (T::lane() == 0) {
      stats->log_b = logs[0] * job.plan.k;
      stats->log_o = logs[1] * job.plan.k;
      stats->rest = largest[0] + (largest[1] > 0 ? largest[1] - 1 : 0);
      stats->top_o = scratch.top_o;
      stats->first_b = -first_b;
      stats->first_o = -first_o;
    }
  }

  template <int N> KD_DEVICE void share(int from, float (&x)[N]) {
    gpu::warp_sum(x);
    if (T::lane() == 0) KD_UNROLL for (int i = 0; i < N; i++) scratch.sums[T::warp()][from + i] = x[i];
  }
  template <int N> KD_DEVICE void collect(int from, double (&x)[N]) const {  // by a warp
    KD_UNROLL for (int i = 0; i < N; i++) x[i] =
        T::lane() < G::kWarps ? scratch.sums[T::lane()][from + i] : 0;
    gpu::warp_sum(x);
  }

  // The tile in the slot, whose copies this thread has waited for, as a block of its row: to *part, *hard and
  // *stats, by the first warp.
  KD_DEVICE void measure(Part *part, SmoothPart *hard, TileStats *stats) {
    constexpr int kSums = kShape == kTilted ? 5 : 3;
    const Plan &plan = job.plan;
    // a tile that is measured again may have been a masked one
    allow_whole(true);
    const float own = largest_base(), of_warp = gpu::warp_largest(own);
    if (T::lane() == 0) scratch.top[T::warp()] = of_warp;
    if ((job.hard && !plan.student_base) || job.entropies) {
      const float o = gpu::warp_largest(largest_other());
      if (T::lane() == 0) scratch.other_top[T::warp()] = o;
    }
    T::sync();
    Part p;
    float top = largest_of(scratch.top);
    const float hard_top = job.hard && !plan.student_base ? largest_of(scratch.other_top) : top;
    bool lost = false, none = false;
    // no class of the base here: what the other has is measured from its own largest
    if (top == -INFINITY) {
      const float o = gpu::warp_largest(largest_other());
      bool nan = false;
      chunks([&](int place) {
        float b[kRun], x[kRun];
        load_base(place, b);
        load_other(place, x);
        KD_UNROLL for (int i = 0; i < kRun; i++) nan |= b[i] != b[i] || x[i] != x[i];
      });
      lost = T::any(nan);
      if (T::lane() == 0) scratch.top[T::warp()] = o;
      T::sync();
      top = largest_of(scratch.top);
      none = top == -INFINITY;
    } else if (top < INFINITY) {
      p.ref = find_reference(own, top);
    }
    lost |= !(top < INFINITY);
    p.top = top;
    if (scratch.again && !none) p.ref = scratch.ref;
    const References<float> r = references(p);
    if (job.entropies) sweep_stats(r, largest_of(scratch.other_top));

    KD_ROLLED for (int masked = 0; !lost && !none; masked++) {
      Sums<float> s;
      int32_t wild = 0;
      sweep_whole(r, s, wild);
      other_chunks([&](int place) { step_other(place, r, s, wild, [](int, const Kept<float> &) {}); });
      float x[5] = {s.s, s.d, s.k1, s.k2, s.t}, kept[kSums];
      KD_UNROLL for (int i = 0; i < kSums; i++) kept[i] = x[i];
      share(0, kept);
      const bool far = T::any(!(from_bits(wild) <= job.reach));
      p.care = masked ? kMasked : kFast;
      if (!far) break;
      if (masked) {
        lost = true;
        break;
      }
      allow_whole(false);
    }
    if (job.hard) {
      float x[2]{};
      if (hard_top - hard_top == 0) sweep_hard(hard_top, x);
      share(8, x);
    }
    if (job.smooth) {
      float x[2]{};
      if (hard_top - hard_top == 0) sweep_smooth(hard_top, x);
      share(10, x);
    }
    T::sync();
    if (T::warp() != 0) return;
    if (lost) {
      p.care = kLost;
    } else if (!none) {
      double x[kSums];
      collect(0, x);
      p.s = x[0];
      p.d = x[1];
      p.k1 = x[2];
      if (kShape == kTilted) {
        p.k2 = x[kSums - 2];
        p.t = x[kSums - 1];
      }
      p.offset = plan.k * (double(r.ref) + r.ref_low);
    }
    SmoothPart h;
    if (job.hard) {
      double y[2];
      collect(8, y);
      h.top = hard_top;
      if (hard_top - hard_top == 0) {
        h.rest = y[0] + (y[1] - 1);
        h.s = 1 + h.rest;
      }
    }
    if (job.smooth) {
      double y[2];
      collect(10, y);
      h.below = y[0];
      h.count = y[1];
    }
    if (job.entropies) collect_stats(stats);
    if (T::lane() == 0) {
      *part = p;
      *hard = h;
    }
    gpu::sync_warp();
  }

  // The tile in the slot once more, with the row's shift known: to *part, by the first warp.
  KD_DEVICE void mix(Part *part) {
    allow_whole(part->care == kFast && !part->empty());
    const bool empty = part->empty();
    Sums<float> s;
    int32_t wild = 0;
    if (!empty) {
      const References<float> r = mixed_references(*part);
      // first: the others leave registers
      other_chunks(
          [&](int place) { mix_other(place, r, job.mix, s, wild, [](int, const Kept<float> &) {}); });
      mix_whole(r, s, wild);
    }
    // and what the tile before has shared has been collected
    const bool far = T::any(!(from_bits(wild) <= job.reach));
    float x[kMixedWords] = {s.k1, s.k2, s.t, s.d};
    share(0, x);
    T::sync();
    if (T::warp() != 0) return;
    double y[kMixedWords];
    collect(0, y);
    if (T::lane() == 0) {
      part->terms = y[0];
      part->lacks = y[1];
      part->excess = y[2];
      part->moved = far ? NAN : y[3];  // the row is lost
    }
    gpu::sync_warp();
  }

  KD_DEVICE void add_hard(int place, const HardPart &h, const Factors &f, int label, float label_gradient,
                          float (&g)[kRun]) const {
    float z[kRun];
    load_student(place, z);
    const float top = float(h.top), scale = h.s > 0 ? f.hard : 0;
    KD_UNROLL for (int i = 0; i < kRun; i++) {
      const float e = exp2_of_product(z[i] - top, float(kLog2e), 0.f);
      g[i] += class_of(place) + i == label ? label_gradient : scale != 0 ? scale * e : 0;
    }
  }
  // What by_class() is about.
  KD_DEVICE void finish_classes(int place, float (&g)[kRun]) const {
    float z[kRun];
    load_student(place, z);
    const float smoothing = job.smooth ? scratch.smoothing : 0;
    KD_UNROLL for (int i = 0; i < kRun; i++) g[i] =
        (g[i] + (z[i] > -INFINITY ? smoothing : 0)) * slope(z[i], job.student);
  }
  // left_over, of factors times `less`
  KD_DEVICE float rest_of(const Factors &f, float less = 1) const {
    return job.mix.tvd ? left_over(f.A * less, f.C * less, f.end * less) : 0;
  }
  // em and et of the warp that closes the row, which needs its registers meanwhile.
  KD_DEVICE void shelve(float *shelf) const {
    constexpr int n = G::kChunks * kRun;
    KD_UNROLL for (int i = 0; i < n; i++) {
      shelf[i * 32 + T::lane()] = em[i];
      if (kShape == kTilted) shelf[(n + i) * 32 + T::lane()] = et[i];
    }
  }
  KD_DEVICE void unshelve(const float *shelf) {
    constexpr int n = G::kChunks * kRun;
    KD_UNROLL for (int i = 0; i < n; i++) {
      em[i] = shelf[i * 32 + T::lane()];
      if (kShape == kTilted) et[i] = shelf[(n + i) * 32 + T::lane()];
    }
  }

  // The gradient of the tile, whose em and et are in registers.
  KD_DEVICE void emit_whole(const Part &p, const HardPart &h, const Factors &f, int label,
                            float label_gradient) const {
    const References<float> r = references(p);
    const float student_top = kShape == kMixed ? top_of_student(r.top, scratch, job) : 0;
    const float A = kShape == kMixed ? f.A * f.less : f.A, C = kShape == kMixed ? f.C * f.less : f.C,
                rest = kShape == kMixed ? rest_of(f, f.less) : 0;
    whole_chunks([&](int j, int place) {
      float b[kRun], g[kRun];
      if (kShape == kMixed && !job.plan.student_base)
        unpack<kO>(other_at(place), other_f16(), b);
      else
        unpack<kB>(base_at(place), base_f16(), b);
      KD_UNROLL for (int i = 0; i < kRun; i++) {
        if (kShape == kMixed) {
          g[i] = exp2_of_product(b[i] - student_top, r.c, 0.f) * ((A * em[j * kRun + i] + C) + rest);
          continue;
        }
        g[i] = C * weight_of(b[i], r) + A * em[j * kRun + i];
        if (kShape == kTilted) g[i] += f.B * et[j * kRun + i];
      }
      if (job.hard) add_hard(place, h, f, label, label_gradient, g);
      put_whole(at.grad + int64_t(class_of(place)) * size_of(grad_dtype()), grad_dtype(), g);
    });
  }
  KD_DEVICE void emit(const Part &p, const HardPart &h, const Factors &f, int label,
                      float label_gradient) const {
    emit_whole(p, h, f, label, label_gradient);
    const References<float> r = kShape == kMixed ? mixed_references(p) : references(p);
    const bool lone = kShape == kTilted && job.plan.student_base, empty = p.empty();
    other_chunks([&](int place) {
      float g[kRun];
      if (empty) {
        KD_UNROLL for (int i = 0; i < kRun; i++) g[i] = 0 * f.C;
      } else if constexpr (kShape == kMixed) {
        Sums<float> unused;
        int32_t wild = 0;
        const float rest = rest_of(f);
        mix_other(place, r, job.mix, unused, wild,
                  [&](int i, const Kept<float> &k) { g[i] = k.e * ((f.A * k.em + f.C) + rest); });
      } else {
        Sums<float> unused;
        int32_t wild = 0;
        step_other(place, r, unused, wild, [&](int i, const Kept<float> &k) {
          g[i] = lone && k.et == -k.e ? f.lone * k.e
                                      : f.C * k.e + f.A * k.em + (kShape == kTilted ? f.B * k.et : 0);
        });
      }
      if (job.hard) add_hard(place, h, f, label, label_gradient, g);
      if (by_class()) finish_classes(place, g);
      put(at.grad, class_of(place), vocab(), job.call.student_dtype, g);
    });
  }
};

// ---------------------------------------------------------------- closing a row, by a warp
KD_DEVICE double weight_at(const kd_call &c, int64_t row) { return c.weight ? c.weight[row] : 1; }
// The row with its weight and label; by one thread, before anyone writes the gradient over the label's logit.
KD_DEVICE RowAt look_up(const Job &job, int64_t row) {
  const kd_call &c = job.call;
  RowAt at = locate(job, row);
  at.weight = weight_at(c, row);
  at.label = -1;
  if (job.hard && at.weight != 0) {
    const int64_t label = c.labels[row];
    const bool known = label >= 0 && label < c.vocab;
    at.label = known ? int(label) : -1;
    at.label_logit = known ? transformed(element(at.student, label, c.student_dtype), job.student) : NAN;
  }
  return at;
}

// none: the soft term where it has no weight
KD_DEVICE double loss_of(const Job &job, double weight, double value, const HardRow &h, double none = 0) {
  const kd_call &c = job.call;
  double loss = c.value_scale != 0 ? c.value_scale * value : none;
  if (job.hard) loss += c.hard_scale * hard_value(c, h);
  return weight * loss;
}

// For a row that counts for nothing; by a thread.
KD_DEVICE void put_nothing(const kd_call &c, int64_t row) {
  c.loss[row] = 0;
  if (c.stats)
    for (int i = 0; i < KD_STATS; i++) c.stats[row * KD_STATS + i] = NAN;
}
// Of the statistics those of both softmaxes; first: the classes that have the largest logits.
KD_DEVICE void put_shapes(double *out, const Shapes &s, double first_z, double first_v) {
  out[KD_STUDENT_LSE] = s.lse_z;
  out[KD_TEACHER_LSE] = s.lse_v;
  out[KD_STUDENT_ENTROPY] = s.of_z;
  out[KD_TEACHER_ENTROPY] = s.of_v;
  out[KD_STUDENT_TOP] = broken(s) ? NAN : first_z;
  out[KD_TEACHER_TOP] = broken(s) ? NAN : first_v;
}
KD_DEVICE void put_values(const Job &job, double *out, double value, const HardRow &h) {
  out[KD_DIVERGENCE] = value;
  out[KD_CROSS_ENTROPY] = job.hard ? cross_entropy_of(h) : NAN;
}

// The parts [0, n) of a row that is closed, those of this block from `mine` on: factors tile
// by tile, flags and, where `loss` is given, the row's loss.
template <Shape kShape, class G>
KD_DEVICE void finish(const Job &job, const RowAt &x, const Row &row, Part *parts, SmoothPart *hards, int n,
                      int mine, int tiles, Scratch<G> &scratch, Factors *factors, double *loss) {
  const WarpCrew crew;
  const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31))));
  const kd_call &c = job.call;
  HardRow h;
  if (job.hard)
    h = close_hard(c, n, [&](int i) -> const SmoothPart & { return hards[i]; }, x.label_logit, crew);
  const double scale = x.weight * c.grad_scale, hard_scale = x.weight * c.hard_grad_scale;
  KD_ROLLED for (int i = lane; i < tiles && !row.lost; i += 32) {
    const Part &p = parts[mine + i];
    const HardPart &own = hards[mine + i];
    const Coefficients k = coefficients(p, row, job.plan, scale);
    Factors f{float(k.A), float(k.B), float(k.C), float(k.C - k.B), 0, 1, float(k.end)};
    if (kShape == kMixed && !job.plan.student_base) {
      f.less = float(
          exp_of(job.plan.k * ((double(top_of_student(float(p.top), scratch, job)) - p.top) - scratch.ref)));
    }
    if (job.hard) {
      if (own.s > 0) f.hard = float(hard_scale * (1 + h.pull) * exp_of(own.top - h.top) / h.s);
      if (!(x.label_logit == x.label_logit)) f.C = f.lone = NAN;
    }
    factors[i] = f;
  }
  gpu::sync_warp();
  if (lane == 0) {
    scratch.lost = row.lost;
    scratch.again = row.refine;
    scratch.ref = row.shift / job.plan.k;
    if (job.hard) scratch.label_gradient = hard_scale * label_gradient(c, h);
    if (job.smooth) scratch.smoothing = float(-hard_scale * c.label_smoothing / h.count);
    if (loss && !row.refine) *loss = row.lost ? from_bits(kLostMark) : loss_of(job, x.weight, row.value, h);
    if (loss && c.stats) put_values(job, c.stats + (loss - c.loss) * KD_STATS, row.value, h);
  }
}

// The same after the first sweep. A row of the mixture family is not done with that.
template <Shape kShape, class G>
KD_DEVICE void close(const Job &job, const RowAt &x, Part *parts, SmoothPart *hards, TileStats *stats, int n,
                     int mine, int tiles, Scratch<G> &scratch, Factors *factors, double *loss) {
  const WarpCrew crew;
  const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31))));
  int care = 0;
  KD_ROLLED for (int i = lane; i < n; i += 32) if (parts[i].care > care) care = parts[i].care;
  Row row;
  row.lost = gpu::warp_largest(care) == kLost;
  if (!row.lost) row = close_row(parts, n, job.plan, crew);
  if (scratch.again) row.refine = false;
  if (loss && job.entropies && !row.lost) {
    const Shapes shapes = shapes_of(parts, stats, n, row, job.plan, crew);
    if (job.plan.entropy) row.value += shapes.of_v;
    const int b = crew.first(n, [&](int i) { return parts[i].s > 0 ? parts[i].top : -INFINITY; }),
              o = crew.first(n, [&](int i) { return stats[i].top_o; });
    const double first_b = stats[b].first_b, first_o = stats[o].first_o;
    double *const out = job.call.stats + (loss - job.call.loss) * KD_STATS;
    if (lane == 0 && job.call.stats)
      put_shapes(out, shapes, job.plan.student_base ? first_b : first_o,
                 job.plan.student_base ? first_o : first_b);
  }
  if (kShape != kMixed)
    return finish<kShape>(job, x, row, parts, hards, n, mine, tiles, scratch, factors, loss);
  gpu::sync_warp();
  if (lane == 0) {
    const double ref = row.shift / job.plan.k;
    const float high = float(ref), low = float(ref - high);
    scratch.lost = row.lost;
    scratch.again = row.refine;
    scratch.ref = ref;
    scratch.ref_high = high;
    scratch.ref_low = low;
    scratch.ref_rest = float(job.plan.k * ((ref - high) - low) * kLog2e);
    if (loss && row.lost) *loss = from_bits(kLostMark);
  }
}
// And after the second, whose sums the parts have now.
template <class G>
KD_DEVICE void close_again(const Job &job, const RowAt &x, Part *parts, SmoothPart *hards, int n, int mine,
                           int tiles, Scratch<G> &scratch, Factors *factors, double *loss) {
  Row row;
  close_mixed(parts, n, job.plan, row, WarpCrew());
  row.shift = scratch.ref * job.plan.k;
  finish<kMixed>(job, x, row, parts, hards, n, mine, tiles, scratch, factors, loss);
}

}  // namespace KD_LEVEL
}  // namespace kd

// The second sweep of a tile of the mixture family, from the row's own shift.
#pragma once
#include "sweep.h"

namespace kd {
namespace KD_LEVEL {

// What a whole chunk is, found out for the whole of it: a branch within would keep its classes from being
// computed side by side. kOfNear: no |y| of a warp's is above Mixed::near; else kOfEven has no share_weight
// (JSD's weights), kOfSkewed has some.
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

template <class Tile> KD_DEVICE RowReference<float> row_reference(const Tile &t, const Part &p) {
  const auto &scratch = t.scratch;
  return {{float(p.top), scratch.ref_high, scratch.ref_low, t.job.c, Tile::kCarry ? t.job.c_low : 0, 0, 0,
           t.job.reach, false},
          scratch.ref_rest};
}

template <bool kCarry, bool kMask, class Mix>
KD_DEVICE Second<float> step_again(float b, float o, const RowReference<float> &at, const Mix &mix,
                                   SecondSums<float> &s) {
  const float a = (b - at.r.top) * at.r.c;
  return step_by_class<kCarry, kMask, kMask>(b, o, at, mix, gpu::exp2(a),
                                             gpu::exp2(a + deviation<kCarry>(b, o, at.r, at.rest)), s);
}

// q and xi of a chunk that is not whole, to keep(i, .).
template <class Tile, class Keep>
KD_DEVICE void mix_other(const Tile &t, int place, const RowReference<float> &at, SecondSums<float> &s,
                         Keep keep) {
  float b[kRun], o[kRun];
  t.load_base(place, b);
  t.load_other(place, o);
  KD_UNROLL for (int i = 0; i < kRun; i++)
      keep(i, step_again<Tile::kCarry, true>(b[i], o[i], at, t.job.mix, s));
}

// The logits of a whole chunk, which the first sweep has seen to be finite.
struct Chunk { float b[kRun], o[kRun]; };

// The largest |y| of a chunk.
template <bool kCarry> KD_DEVICE float farthest(const Chunk &x, const RowReference<float> &at) {
  float most = 0;
  KD_UNROLL for (int i = 0; i < kRun; i++) most =
      gpu::largest(most, std::fabs(deviation<kCarry>(x.b[i], x.o[i], at.r, at.rest)));
  return most;
}
// q and xi of a chunk that no mask is in, to keep(i, .).
template <MixKind kMix, bool kCarry, class Keep>
KD_DEVICE void mix_chunk_as(const Chunk &x, const RowReference<float> &at, const Mixed<float> &all,
                            SecondSums<float> &s, Keep keep) {
  const MixedAs<kMix> mix(all);
  KD_UNROLL for (int i = 0; i < kRun; i++) keep(i, step_again<kCarry, false>(x.b[i], x.o[i], at, mix, s));
}
// near: that no |y| of the warp's is above Mixed::near.
template <bool kCarry, class Keep>
KD_DEVICE void mix_chunk(bool near, const Chunk &x, const RowReference<float> &at, const Mixed<float> &all,
                         SecondSums<float> &s, Keep keep) {
  if (near)
    mix_chunk_as<kOfNear, kCarry>(x, at, all, s, keep);
  else if (all.tvd)
    mix_chunk_as<kOfTvd, kCarry>(x, at, all, s, keep);
  else if (all.l == 0)
    mix_chunk_as<kOfReverse, kCarry>(x, at, all, s, keep);
  else if (!all.cancels && all.share_weight == 0)
    mix_chunk_as<kOfEven, kCarry>(x, at, all, s, keep);
  else
    mix_chunk_as<kOfSkewed, kCarry>(x, at, all, s, keep);
}
// Chunk by chunk in a rolled loop, which moves the xi of those before along: unrolled, its five kinds would
// be more code than a multiprocessor keeps at hand.
template <class Tile> KD_DEVICE void mix_whole(Tile &t, const RowReference<float> &at, SecondSums<float> &s) {
  using G = typename Tile::G;
  const Mixed<float> &mix = t.job.mix;
  const bool general = !mix.tvd && mix.l != 0;
  float most = 0;
  KD_ROLLED for (int j = 0; j < G::kChunks; j++) {
    KD_UNROLL for (int i = 0; i + kRun < G::kChunks * kRun; i++) t.held.xi[i] = t.held.xi[i + kRun];
    const int place = j * G::kThreads + Tile::T::thread();
    const bool whole = place >= t.whole_from && place < t.whole_to;
    Chunk x;
    float own = 0;
    if (whole) {
      t.load_whole(place, x.b, x.o);
      own = farthest<Tile::kCarry>(x, at);
      most = gpu::largest(most, own);
    }
    const bool near = general && !gpu::warp_any(!(own <= mix.near));  // every lane is asked
    if (!whole) continue;
    // to the last that stay
    mix_chunk<Tile::kCarry>(near, x, at, mix, s, [&](int i, const Second<float> &k) {
      t.held.xi[(G::kChunks - 1) * kRun + i] = k.xi;
    });
  }
  const int32_t far = bits(most);
  s.farthest = far > s.farthest ? far : s.farthest;
}

// The tile in the slot once more, with the row's shift known: to part->second, by the first warp.
template <class Tile> KD_DEVICE void mix(Tile &t, Part *part) {
  using T = typename Tile::T;
  const bool empty = part->empty();
  t.allow_whole(part->care == kFast && !empty);
  SecondSums<float> s;
  if (!empty) {
    const RowReference<float> at = row_reference(t, *part);
    // the chunks that are not whole come first, as they leave registers
    t.other_chunks([&](int place) { mix_other(t, place, at, s, [](int, const Second<float> &) {}); });
    mix_whole(t, at, s);
  }
  // and what the tile before has published has been collected
  const bool far = T::any(!(from_bits(s.farthest) <= t.job.reach));
  float x[kSecondWords] = {s.terms, s.lacks, s.excess, s.G};
  t.publish(kAtSweep, x);
  T::sync();
  if (T::warp() != 0) return;
  double y[kSecondWords];
  t.collect(kAtSweep, y);
  if (T::lane() == 0) part->second = {y[0], y[1], y[2], far ? NAN : y[3]};  // nan: the row is lost
  gpu::sync_warp();
}

}  // namespace KD_LEVEL
}  // namespace kd

// A tile's logits on their way to its slot. Those with a transform are transformed where they lie, by the
// thread that has copied them, before anything else looks at them: as fp32, whatever they come as, so that
// all that follows is what rows of fp32 get.
#pragma once
#include "tile.h"

namespace kd {
namespace KD_LEVEL {

// This thread's chunks, on their way to the slot. A chunk of 16-bit logits that will be transformed goes to
// the second half of its place.
template <class Tile> KD_DEVICE void fetch_own(const Tile &t) {
  if constexpr (Tile::kB == 4 && Tile::kO == 4)
    if (t.job.transformed) {
      const auto bring = [&](char *to, const char *row, int32_t dtype, int from) {
        if (dtype == KD_F32)
          fetch<4>(to, row, from, t.vocab());
        else
          fetch<2>(to + 2 * kRun, row, from, t.vocab());
      };
      return t.chunks([&](int place) {
        bring(t.base_at(place), t.base_row(), t.base_dtype(), t.class_of(place));
        bring(t.other_at(place), t.other_row(), t.other_dtype(), t.class_of(place));
      });
    }
  t.chunks([&](int place) {
    fetch<Tile::kB>(t.base_at(place), t.base_row(), t.class_of(place), t.vocab());
    fetch<Tile::kO>(t.other_at(place), t.other_row(), t.class_of(place), t.vocab());
  });
}

// What fetch_own has brought.
template <class Tile> KD_DEVICE void transform_own(const Tile &t) {
  if constexpr (Tile::kB == 4 && Tile::kO == 4)
    if (t.job.transformed) {
      const auto with = [&](char *p, int32_t dtype, const Transform<float> &of) {
        float x[kRun];
        if (dtype == KD_F32)
          unpack<4>(p, false, x);
        else
          unpack<2>(p + 2 * kRun, dtype == KD_F16, x);
        KD_UNROLL for (int h = 0; h < 2; h++) {
          gpu::Word4 w;
          KD_UNROLL for (int i = 0; i < 4; i++) w.x[i] = (uint32_t)bits(transformed(x[4 * h + i], of));
          gpu::store16(p + 16 * h, w);
        }
      };
      t.chunks([&](int place) {
        with(t.base_at(place), t.base_dtype(), t.job.plan.base(t.job.student, t.job.teacher));
        with(t.other_at(place), t.other_dtype(), t.job.plan.other(t.job.student, t.job.teacher));
      });
    }
}

}  // namespace KD_LEVEL
}  // namespace kd

// The part of a row that is paid for each logit, alone and without branches, for counting its instructions
// (cuda_aot.py): the copy to shared memory, the largest, the sweep (both, of the mixture family) and the
// gradient of whole chunks of bf16 or fp32 rows without labels. Compiled for two numbers of chunks to a
// thread: the difference is what 8 classes each of student and teacher take.
#define KD_LEVEL device
#define KD_ARCHS ""
#define KD_ROLLED _Pragma("unroll")
#include "../csrc/cuda/plan.h"

namespace kd {
namespace KD_LEVEL {

template <int kChunks, Shape kShape, int kMix, int kB, int kO, bool kBulk>
KD_KERNEL KD_LAUNCH_BOUNDS(256, 2) probe(const KD_PARAM Job given) {
  using G = Geometry<256, kChunks>;
  Job job = given;
  job.hard = 0;
  job.plan.moments = job.plan.entropy = false;
  job.plan.student_base = kShape == kTilted && kB < kO;
  job.mix.student_base = false;
  job.call.student_dtype =
      job.plan.student_base ? (kB == 4 ? KD_F32 : KD_BF16) : (kO == 4 ? KD_F32 : KD_BF16);
  job.call.teacher_dtype =
      job.plan.student_base ? (kO == 4 ? KD_F32 : KD_BF16) : (kB == 4 ? KD_F32 : KD_BF16);
  const Desk<G> desk(gpu::shared(), 1, 1);
  Tile<G, kShape, kB, kO> tile(job, *desk.scratch, desk.scratch->row[0]);
  tile.turn_to(0, G::kTile, desk.logits);
  tile.count = tile.whole_to = G::kTile;  // every chunk is whole
  tile.whole_from = 0;
  if (!kBulk) {
    tile.fetch_own();
    gpu::copy_commit();
    gpu::copy_wait<0>();
  }
  gpu::sync_block();
  desk.scratch->top[0] = tile.largest_base();
  gpu::sync_block();
  Sums<float> s;
  int32_t wild = 0;
  tile.sweep_whole(tile.references(desk.parts[0]), s, wild);
  float sums[5] = {s.s, s.d, s.k1, s.k2, s.t};
  tile.share(0, sums);
  if (gpu::sync_block_any(!(from_bits(wild) <= job.reach))) return;
  if constexpr (kShape == kMixed) {  // mix_whole, of one kind
    const References<float> r = tile.mixed_references(desk.parts[0]);
    Sums<float> again;
    float most = 0;
    KD_UNROLL for (int j = 0; j < kChunks; j++) {
      KD_UNROLL for (int i = 0; i + kRun < kChunks * kRun; i++) tile.em[i] = tile.em[i + kRun];
      float b[kRun], o[kRun];
      tile.load_whole(j * G::kThreads + gpu::thread(), b, o);
      most = gpu::largest(most, tile.farthest(b, o, r));
      tile.template mix_chunk<MixKind(kMix)>(b, o, r, job.mix, again, [&](int i, const Kept<float> &k) {
        tile.em[(kChunks - 1) * kRun + i] = k.em;
      });
    }
    float more[kMixedWords] = {again.k1, again.k2, again.t, again.d};
    tile.share(5, more);
    if (gpu::sync_block_any(!(most <= job.reach))) return;
  }
  tile.emit_whole(desk.parts[0], desk.hards[0], desk.factors[0], -1, 0);
}
#define PROBE(chunks, shape, mix, b, o) \
  template __global__ void probe<chunks, shape, mix, b, o, KD_BULK>(const KD_PARAM Job);
#define PROBES(shape, mix)   \
  PROBE(1, shape, mix, 2, 2) \
  PROBE(2, shape, mix, 2, 2) \
  PROBE(1, shape, mix, 4, 4) \
  PROBE(2, shape, mix, 4, 4)
PROBES(kPlain, 0)
PROBES(kTilted, 0)
PROBES(kMixed, kOfTvd)
PROBES(kMixed, kOfReverse)
PROBES(kMixed, kOfNear)
PROBES(kMixed, kOfEven)
PROBES(kMixed, kOfSkewed)

}  // namespace KD_LEVEL
}  // namespace kd

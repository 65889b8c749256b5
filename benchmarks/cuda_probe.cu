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

template <int kChunks, class Family, int kMix, int kB, int kO, bool kBulk>
KD_KERNEL KD_LAUNCH_BOUNDS(256, 2) probe(const KD_PARAM Job given) {
  using G = Geometry<256, kChunks>;
  Job job = given;
  job.hard = 0;
  job.plan.entropy = false;
  job.plan.student_base = Family::kNumbers == 2 && kB < kO;
  job.mix.student_base = false;
  job.call.student_dtype =
      job.plan.student_base ? (kB == 4 ? KD_F32 : KD_BF16) : (kO == 4 ? KD_F32 : KD_BF16);
  job.call.teacher_dtype =
      job.plan.student_base ? (kO == 4 ? KD_F32 : KD_BF16) : (kB == 4 ? KD_F32 : KD_BF16);
  const TeamMemory<G> memory(gpu::shared(), 1, 1);
  Tile<G, Family, kB, kO> tile(job, *memory.scratch, memory.scratch->row[0]);
  tile.turn_to(0, G::kTile, memory.logits);
  tile.count = tile.whole_to = G::kTile;  // every chunk is whole
  tile.whole_from = 0;
  if (!kBulk) {
    fetch_own(tile);
    gpu::copy_commit();
    gpu::copy_wait<0>();
  }
  gpu::sync_block();
  memory.scratch->top[0] = largest_base(tile);
  gpu::sync_block();
  FirstSums<Family, float> s;
  sweep_whole(tile, tile.reference(memory.parts[0]), s);
  publish_sums(tile, s);
  if (gpu::sync_block_any(!(from_bits(s.farthest) <= job.reach))) return;
  if constexpr (Family::kTwice) {  // mix_whole, of one kind
    const RowReference<float> at = row_reference(tile, memory.parts[0]);
    SecondSums<float> again;
    float most = 0;
    KD_UNROLL for (int j = 0; j < kChunks; j++) {
      KD_UNROLL for (int i = 0; i + kRun < kChunks * kRun; i++) tile.held.xi[i] = tile.held.xi[i + kRun];
      Chunk x;
      tile.load_whole(j * G::kThreads + gpu::thread(), x.b, x.o);
      most = gpu::largest(most, farthest<tile.kCarry>(x, at));
      mix_chunk_as<MixKind(kMix), tile.kCarry>(x, at, job.mix, again, [&](int i, const Second<float> &k) {
        tile.held.xi[(kChunks - 1) * kRun + i] = k.xi;
      });
    }
    float more[kSecondWords] = {again.terms, again.lacks, again.excess, again.G};
    tile.publish(kAtLargest, more);
    if (gpu::sync_block_any(!(most <= job.reach))) return;
  }
  emit_whole(tile, {memory.parts[0], memory.hards[0], memory.factors[0], -1, 0});
}
#define PROBE(chunks, family, mix, b, o) \
  template __global__ void probe<chunks, family, mix, b, o, KD_BULK>(const KD_PARAM Job);
#define PROBES(family, mix)   \
  PROBE(1, family, mix, 2, 2) \
  PROBE(2, family, mix, 2, 2) \
  PROBE(1, family, mix, 4, 4) \
  PROBE(2, family, mix, 4, 4)
PROBES(Plain, 0)
PROBES(Tilted, 0)
PROBES(Mixture, kOfTvd)
PROBES(Mixture, kOfReverse)
PROBES(Mixture, kOfNear)
PROBES(Mixture, kOfEven)
PROBES(Mixture, kOfSkewed)

}  // namespace KD_LEVEL
}  // namespace kd

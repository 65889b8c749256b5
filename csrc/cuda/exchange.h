// A team's shared memory, and the exchange of tiles' sums between the blocks of a row, through memory.
#pragma once
#include "job.h"
#include "team.h"

namespace kd {
namespace KD_LEVEL {

// Shared memory of a team: its scratch, the parts of the row, the factors of its own tiles, the logits.
template <class G> struct TeamMemory {
  Scratch<G> *scratch;
  Part *parts;
  SmoothPart *hards;
  TileStats *stats;
  Factors *factors;
  float *shelf;
  char *logits;
  KD_HD TeamMemory(char *memory, int parts_of_row, int tiles) {
    scratch = (Scratch<G> *)memory;
    memory += round_up(sizeof(Scratch<G>));
    parts = (Part *)memory;
    memory += round_up(parts_of_row * sizeof(Part));
    hards = (SmoothPart *)memory;
    memory += round_up(parts_of_row * sizeof(SmoothPart));
    stats = (TileStats *)memory;
    memory += round_up(parts_of_row * sizeof(TileStats));
    factors = (Factors *)memory;
    memory += round_up(tiles * sizeof(Factors));
    shelf = (float *)memory;
    memory += 32 * G::kChunks * kRun * 2 * sizeof(float);
    logits = memory;
  }
  static KD_HD int round_up(int64_t bytes) { return int((bytes + 15) / 16 * 16); }
};

// Own tiles' sums to everyone's, by a warp: written, announced, awaited, read.
template <class G>
KD_DEVICE void exchange(const Job &job, const TeamMemory<G> &here, int64_t row, int part, int tiles,
                        bool again) {
  const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31)))), n = job.parts * tiles;
  double *state = job.state + row * int64_t(job.parts * job.tiles) * kWords;
  // at the first exchange, at the second, before it; at that of sums swept again
  uint32_t *arrived = job.tickets + 1 + kCounters * row;
  if (again) {  // everyone has read what is about to be written over
    gpu::sync_warp();
    if (lane == 0) {
      gpu::announce(arrived + 2);
      gpu::await(arrived + 2, job.parts);
    }
    gpu::sync_warp();
    arrived++;
  }
  KD_ROLLED for (int i = lane; i < tiles * kWords; i += 32) {
    const int t = part * tiles + i / kWords, w = i % kWords;
    state[t * kWords + w] = w < kPartWords ? ((const double *)(here.parts + t))[w]
                                           : ((const double *)(here.hards + t))[w - kPartWords];
  }
  double *const stats =
      job.state + (job.call.rows * (kWords + job.second_words) + row * kStatWords) * (job.parts * job.tiles);
  if (job.entropies)
    KD_ROLLED for (int i = part * tiles * kStatWords + lane; i < (part + 1) * tiles * kStatWords; i += 32)
        stats[i] = ((double *)here.stats)[i];
  gpu::sync_warp();
  if (lane == 0) {
    gpu::announce(arrived);
    gpu::await(arrived, job.parts);
  }
  gpu::sync_warp();
  if (job.entropies)
    KD_ROLLED for (int i = lane; i < n * kStatWords; i += 32)((double *)here.stats)[i] =
        gpu::load_fresh(stats + i);
  KD_ROLLED for (int i = lane; i < n * kWords; i += 32) {
    const int t = i / kWords, w = i % kWords;
    *(w < kPartWords ? (double *)(here.parts + t) + w : (double *)(here.hards + t) + (w - kPartWords)) =
        gpu::load_fresh(state + i);
  }
  gpu::sync_warp();
}

// The sums of the mixture family's second sweep likewise, at a place of their own.
template <class G>
KD_DEVICE void exchange_again(const Job &job, const TeamMemory<G> &here, int64_t row, int part, int tiles) {
  const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31)))), n = job.parts * tiles;
  const int64_t all = int64_t(job.parts * job.tiles);
  double *state = job.state + job.call.rows * all * kWords + row * all * kSecondWords;
  uint32_t *arrived = job.tickets + 1 + kCounters * row + 3;
  KD_ROLLED for (int i = lane; i < tiles * kSecondWords; i += 32) {
    const int t = part * tiles + i / kSecondWords, w = i % kSecondWords;
    state[t * kSecondWords + w] = ((const double *)&here.parts[t].second)[w];
  }
  gpu::sync_warp();
  if (lane == 0) {
    gpu::announce(arrived);
    gpu::await(arrived, job.parts);
  }
  gpu::sync_warp();
  KD_ROLLED for (int i = lane; i < n * kSecondWords; i += 32)(
      (double *)&here.parts[i / kSecondWords].second)[i % kSecondWords] = gpu::load_fresh(state + i);
  gpu::sync_warp();
}

}  // namespace KD_LEVEL
}  // namespace kd

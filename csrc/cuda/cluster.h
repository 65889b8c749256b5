// A row to a cluster of blocks, clusters that stay: sm_90 and sm_100, where both rows' slices fit the blocks'
// shared memory.
//
// Each block holds its slice of both rows in their dtypes. Bulk copies fill a ring of slices some rows ahead,
// so that memory never waits for arithmetic; the blocks send each other their tile's sums through distributed
// shared memory, once per row, with one cluster barrier; em and et are retained in registers, so they are
// computed once. (Twice in the mixture family, from the slices as they lie, with a second exchange; what is
// retained is xi.) Two blocks to a multiprocessor: the sums of one row are exchanged while
// the other row is computed.
#pragma once
#include "close.h"
#include "fetch.h"

namespace kd {
namespace KD_LEVEL {

constexpr int kMostBlocks = 16;  // of a cluster

template <class G> struct BlockMemory {
  Scratch<G> scratch;
  // of this row and of the one before, which a slower block may still read
  Part own, parts[2][kMostBlocks];
  SmoothPart own_hard, hards[2][kMostBlocks];
  TileStats own_stats, stats[2][kMostBlocks];
  Factors factors[1];
  float shelf[32 * G::kChunks * kRun * 2];  // of the mixture family the first half
  static_assert(sizeof(double) * kMostBlocks * kSecondWords <= sizeof(float) * 32 * G::kChunks * kRun,
                "the blocks' second sums have room in the other");
  // [kMostBlocks][kSecondWords]
  KD_DEVICE double *second() { return (double *)(shelf + 32 * G::kChunks * kRun); }
  gpu::Arrivals filled[8];  // of each slot of the ring
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <class G, class Family, int kB, int kO> struct ClusterRows {
  using T = Team<G>;
  using TileOf = Tile<G, Family, kB, kO>;
  const Job &job;
  BlockMemory<G> &memory;
  char *const logits;
  const int rank, blocks;

  KD_DEVICE int64_t row_at(int turn) const { return gpu::cluster() + turn * gpu::clusters(); }
  // where a row's loss goes, of the block that writes it
  KD_DEVICE double *loss_at(int turn) const {
    return rank == 0 ? job.call.loss + row_at(int(gpu::from_here(int64_t(turn)))) : nullptr;
  }
  KD_DEVICE RowParts parts_of(BlockMemory<G> &memory, int parity) const {
    return {
        memory.parts[parity], memory.hards[parity], memory.stats[parity], memory.factors, blocks, rank, 1};
  }
  KD_DEVICE char *slot(int turn) const { return logits + turn % job.stages * TileOf::kBytes; }
  KD_DEVICE void take_slice(TileOf &tile, int turn) const {
    const int slice = (tile.at.chunks + blocks - 1) / blocks, from = slice * rank;
    tile.turn_to(from, from + slice < tile.at.chunks ? from + slice : tile.at.chunks, slot(turn));
  }

  // The whole chunks of a slice, on their way to its slot; an empty phase for a row that does not count. By
  // one thread.
  KD_DEVICE void issue(int turn) const {
    const int64_t row = row_at(turn);
    if (row >= job.call.rows) return;
    gpu::Arrivals *filled = memory.filled + turn % job.stages;
    if (weight_at(job.call, row) == 0) {
      gpu::arrivals_expect(filled, 0);
      return;
    }
    const RowAt at = locate(job, row);
    TileOf tile(job, memory.scratch, at);
    take_slice(tile, turn);
    int place = 0, to = tile.count;
    if (place < to && !tile.inside(place)) place++;
    if (place < to && !tile.inside(to - 1)) to--;
    const int chunks = place < to ? to - place : 0;
    gpu::arrivals_expect(filled, chunks * kRun * (kB + kO));
    if (!chunks) return;
    gpu::copy_bulk(tile.base_at(place), tile.base_row() + int64_t(tile.class_of(place)) * kB,
                   chunks * kRun * kB, filled);
    gpu::copy_bulk(tile.other_at(place), tile.other_row() + int64_t(tile.class_of(place)) * kO,
                   chunks * kRun * kO, filled);
  }

  // What the bulk copy leaves out: classes of chunks that are not whole, by the thread that will read them.
  KD_DEVICE void fetch_edges(const TileOf &tile) const {
    tile.chunks([&](int place) {
      if (tile.inside(place)) return;
      fetch<kB>(tile.base_at(place), tile.base_row(), tile.class_of(place), tile.vocab());
      fetch<kO>(tile.other_at(place), tile.other_row(), tile.class_of(place), tile.vocab());
      gpu::before_bulk();  // a later row's bulk copy may write here
    });
  }

  // The block's part to every block of the cluster, by a warp.
  KD_DEVICE void send(int parity) const {
    const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31))));
    KD_ROLLED for (int i = lane; i < blocks * kWords; i += 32) {
      const int w = i % kWords;
      const bool soft = w < kPartWords;
      double *to = soft ? (double *)(memory.parts[parity] + rank) + w
                        : (double *)(memory.hards[parity] + rank) + (w - kPartWords);
      *gpu::of_block(to, i / kWords) =
          soft ? ((const double *)&memory.own)[w] : ((const double *)&memory.own_hard)[w - kPartWords];
    }
    if (job.entropies) KD_ROLLED for (int i = lane; i < blocks * kStatWords; i += 32) {
        *gpu::of_block((double *)(memory.stats[parity] + rank) + i % kStatWords, i / kStatWords) =
            ((const double *)&memory.own_stats)[i % kStatWords];
      }
  }

  // The sums of its second sweep likewise, which nobody reads any more when the next ones are sent: a first
  // exchange comes between.
  KD_DEVICE void send_again() const {
    const int lane = int(gpu::from_here(int64_t((gpu::thread() & 31))));
    KD_ROLLED for (int i = lane; i < blocks * kSecondWords; i += 32) {
      const int w = i % kSecondWords;
      *gpu::of_block(memory.second() + rank * kSecondWords + w, i / kSecondWords) =
          ((const double *)&memory.own.second)[w];
    }
  }

  // The second sweep, its exchange and the close of the row.
  KD_DEVICE void sweep_again(TileOf &tile, int parity, int turn) const {
    mix(tile, &memory.own);
    if (T::warp() == 0) send_again();
    gpu::sync_cluster();
    if (T::warp() == 0) {
      BlockMemory<G> &memory = *gpu::from_here(&this->memory);
      tile.held.shelve(memory.shelf, T::lane());
      const int lane = gpu::thread() & 31;
      if (lane < blocks)
        for (int w = 0; w < kSecondWords; w++)
          ((double *)&memory.parts[parity][lane].second)[w] = memory.second()[lane * kSecondWords + w];
      gpu::sync_warp();
      close_again(tile, parts_of(memory, parity), loss_at(turn));
      tile.held.unshelve(memory.shelf, T::lane());
    }
    gpu::sync_block();
  }

  KD_DEVICE bool last() const { return rank == blocks - 1; }

  // A row of weight 0.
  KD_DEVICE void put_zero_slice(const TileOf &tile, int turn) const {
    if (rank == 0 && T::thread() == 0) put_nothing(job.call, row_at(turn));
    const int from = tile.class_of(0);
    put_zeros(job, tile.at, from < 0 ? 0 : from, last() ? -1 : tile.class_of(tile.count), G::kThreads);
  }

  // The first sweep, its exchange and the row's close; once more where the references were far off. The
  // lowest bit of count is the parity of exchanges: returned is that of the last one.
  KD_DEVICE int sweep(TileOf &tile, int turn, unsigned &count) const {
    KD_ROLLED for (;;) {
      measure(tile, {&memory.own, &memory.own_hard, &memory.own_stats});
      const int parity = count % 2;
      if (T::warp() == 0) send(parity);
      gpu::sync_cluster();
      if (T::warp() == 0) {
        BlockMemory<G> &memory = *gpu::from_here(&this->memory);
        if (!Family::kTwice) tile.held.shelve(memory.shelf, T::lane());
        close(tile, parts_of(memory, parity), loss_at(turn));
        if (!Family::kTwice) tile.held.unshelve(memory.shelf, T::lane());
      }
      gpu::sync_block();
      count ^= 1;
      if (!memory.scratch.again) break;
      gpu::sync_block();
    }
    return count % 2 ^ 1;
  }

  KD_DEVICE void put_gradient(TileOf &tile, int parity) const {
    const Part &p = gpu::from_here(&memory)->parts[parity][rank];
    tile.allow_whole(!tile.by_class() && p.care == kFast && !p.empty());
    emit(tile, {p, memory.hards[parity][rank], memory.factors[0], tile.at.label,
                job.hard ? float(memory.scratch.label_gradient) : 0});
    if (last()) put_zeros(job, tile.at, job.call.vocab, -1, G::kThreads);
  }

  KD_DEVICE void run() {
    Scratch<G> &scratch = memory.scratch;
    if (T::thread() == 0) scratch.again = 0;
    if (T::thread() == 0)
      for (int i = 0; i < job.stages; i++) gpu::arrivals_init(memory.filled + i);
    gpu::sync_cluster();
    if (T::thread() == 0)
      for (int i = 0; i < job.stages - 1; i++) issue(i);
    // the thread that looks up rows, each while the one before is computed, is not the one that issues their
    // copies
    const auto look_up_ahead = [&](int turn) {
      if (T::thread() == 32 && row_at(turn) < job.call.rows)
        scratch.row[turn % 2] = look_up(job, row_at(turn));
    };
    look_up_ahead(0);
    // the row's turn and, below it, the parity of exchanges: two numbers would be a register too many
    KD_ROLLED for (unsigned count = 0; row_at(count / 2) < job.call.rows; count += 2) {
      const int turn = count / 2;
      gpu::sync_block();  // everyone has left the slot of the row before
      if (T::thread() == 0) issue(turn + job.stages - 1);
      look_up_ahead(turn + 1);
      const RowAt &at = scratch.row[turn % 2];
      TileOf tile(job, scratch, at);
      take_slice(tile, turn);
      const bool counts = at.weight != 0;
      if (counts) fetch_edges(tile);
      gpu::arrivals_wait(memory.filled + turn % job.stages, turn / job.stages % 2);
      if (!counts) {
        put_zero_slice(tile, turn);
        continue;
      }
      const int parity = sweep(tile, turn, count);
      if constexpr (Family::kTwice)
        if (!scratch.lost) sweep_again(tile, parity, turn);
      if (!scratch.lost && job.call.grad) put_gradient(tile, parity);
    }
    // nobody leaves while its shared memory may still be written to
    gpu::sync_cluster();
  }
};
#endif

template <class G, class Family, int kB, int kO>
KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads, 512 / G::kThreads) loss_clusters(const KD_PARAM Job job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  BlockMemory<G> &memory = *(BlockMemory<G> *)gpu::shared();
  char *const logits = gpu::shared() + (sizeof(memory) + 127) / 128 * 128;
  ClusterRows<G, Family, kB, kO>{job, memory, logits, gpu::cluster_rank(), gpu::cluster_blocks()}.run();
#endif
}

}  // namespace KD_LEVEL
}  // namespace kd

// Rows by a block each, several rows by a warp each, or a row by several blocks: every architecture.
//
// A block takes a slice of the row tile by tile, the next tile's logits on their way (each thread copies what
// it alone will read, so the ring needs no barrier), closes the row, and emits the gradient from the last
// tile, whose exponentials are in registers, to the first; those before are read again, from the second-level
// cache, and computed again, with the same bits; rows of the mixture family are swept backwards and emitted
// forwards. Several blocks exchange their tiles' sums through memory. A block draws its (row, part) as a
// ticket, in order, so that whoever waits, waits for blocks that have begun.
#pragma once
#include "close.h"
#include "fetch.h"

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

// What the thread held of a tile's whole chunks, with the same bits.
template <class Tile> KD_DEVICE void hold_again(Tile &tile, const Part &p) {
  if constexpr (Tile::Family::kTwice) {
    SecondSums<float> unused;
    mix_whole(tile, row_reference(tile, p), unused);
  } else {
    FirstSums<typename Tile::Family, float> unused;
    sweep_whole(tile, tile.reference(p), unused);
  }
}

template <class G, class Family, int kB, int kO>
KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads *G::kTeams,
                           (Family::kNumbers == 2 ? 384 : 512) / (G::kThreads * G::kTeams))
    loss_rows(const KD_PARAM Job job) {
  using T = Team<G>;
  using TileOf = Tile<G, Family, kB, kO>;
  const kd_call &c = job.call;
  const int team = gpu::thread() / G::kThreads;
  char *const memory = gpu::shared() + team * job.team_bytes;
  const auto here = [&] { return TeamMemory<G>(gpu::from_here(memory), job.parts * job.tiles, job.tiles); };
  Scratch<G> &scratch = *(Scratch<G> *)memory;
  if (T::thread() == 0) {
    int64_t row = gpu::block() * G::kTeams + team;
    scratch.part = scratch.again = 0;
    if (job.parts > 1) {
      const uint32_t ticket = gpu::next_ticket(job.tickets);
      row = ticket / job.parts;
      scratch.part = ticket % job.parts;
    }
    scratch.number = row;
    if (row < c.rows) {
      const RowAt at = look_up(job, row);
      const int slice = (at.chunks + job.parts - 1) / job.parts, from = slice * scratch.part;
      scratch.row[0] = at;
      scratch.from = from;
      scratch.to = from + slice < at.chunks ? from + slice : at.chunks;
      scratch.tiles = slice > G::kTile ? (slice + G::kTile - 1) / G::kTile : 1;
    }
  }
  T::sync();
  if (scratch.number >= c.rows) return;
  const RowAt &at = scratch.row[0];
  const auto last = [&] { return scratch.part == job.parts - 1; };
  if (at.weight == 0) {
    if (scratch.part == 0 && T::thread() == 0) put_nothing(c, scratch.number);
    const int from = scratch.from * kRun - at.offset, to = scratch.to * kRun - at.offset;
    put_zeros(job, at, from < 0 ? 0 : from, last() ? -1 : to, G::kThreads);
    return;
  }
  TileOf tile(job, scratch, at);
  const auto turn_to = [&](int t) {
    tile.turn_to(scratch.from + t * G::kTile, scratch.to, here().logits + t % job.stages * TileOf::kBytes);
  };
  const auto fetch = [&](int t) {  // always a group of copies, for copy_wait to count
    if (t >= 0 && t < scratch.tiles) {
      turn_to(t);
      fetch_own(tile);
    }
    gpu::copy_commit();
  };
  // tile t's place among the row's
  const auto part_of = [&](int t) { return scratch.part * scratch.tiles + t; };
  const auto parts_of = [&](const TeamMemory<G> &own) {
    return RowParts{own.parts,  own.hards,    own.stats, own.factors, job.parts * scratch.tiles,
                    part_of(0), scratch.tiles};
  };
  // where the row's loss goes, of the block that writes it
  const auto loss = [&] { return scratch.part == 0 ? c.loss + scratch.number : nullptr; };

  const bool ahead = job.stages > 1;  // else there is room for one tile at a time
  const auto arrive = [&] {
    if (ahead)
      gpu::copy_wait<1>();
    else
      gpu::copy_wait<0>();
  };
  KD_ROLLED for (;;) {
    if (ahead) fetch(0);
    KD_ROLLED for (int t = 0; t < scratch.tiles; t++) {
      fetch(ahead ? t + 1 : t);
      arrive();
      turn_to(t);
      transform_own(tile);
      const TeamMemory<G> own = here();
      measure(tile, {own.parts + part_of(t), own.hards + part_of(t), own.stats + part_of(t)});
    }
    if (T::warp() == 0) {
      const TeamMemory<G> own = here();
      if (!Family::kTwice) tile.held.shelve(own.shelf, T::lane());
      if (job.parts > 1) exchange(job, own, scratch.number, scratch.part, scratch.tiles, scratch.again);
      close(tile, parts_of(own), loss());
      if (!Family::kTwice) tile.held.unshelve(own.shelf, T::lane());
    }
    T::sync();
    if (!scratch.again) break;
    T::sync();
  }
  if constexpr (Family::kTwice)
    if (!scratch.lost) {  // from the last tile to the first, which stays
      KD_ROLLED for (int t = scratch.tiles - 1; t >= 0; t--) {
        if (t < scratch.tiles - 1) {
          fetch(ahead ? t - 1 : t);
          arrive();
        }
        turn_to(t);
        if (t < scratch.tiles - job.stages) transform_own(tile);  // the others are still in their slots
        mix(tile, here().parts + part_of(t));
      }
      if (T::warp() == 0) {
        const TeamMemory<G> own = here();
        tile.held.shelve(own.shelf, T::lane());
        if (job.parts > 1) exchange_again(job, own, scratch.number, scratch.part, scratch.tiles);
        close_again(tile, parts_of(own), loss());
        tile.held.unshelve(own.shelf, T::lane());
      }
      T::sync();
    }
  if (scratch.lost || !c.grad) return;

  const float label_gradient = job.hard ? float(scratch.label_gradient) : 0;
  // from the tile that was swept last; the one before it may still be in its slot as well
  constexpr int kBack = Family::kTwice ? 1 : -1;
  const auto held = [&] { return Family::kTwice ? 0 : scratch.tiles - 1; };
  KD_ROLLED for (int t = held(); t >= 0 && t < scratch.tiles; t += kBack) {
    if (t != held()) {
      fetch(ahead ? t + kBack : t);
      arrive();
    }
    turn_to(t);
    if (Family::kTwice ? t >= job.stages : t < scratch.tiles - job.stages) transform_own(tile);
    const TeamMemory<G> own = here();
    const Part &p = own.parts[part_of(t)];
    tile.allow_whole(p.care == kFast && !p.empty() && !tile.by_class());
    if (t != held()) hold_again(tile, p);
    emit(tile, {p, own.hards[part_of(t)], own.factors[t], at.label, label_gradient});
  }
  if (last()) put_zeros(job, at, c.vocab, -1, G::kThreads);
}

}  // namespace KD_LEVEL
}  // namespace kd

// Rows by a block each, several rows by a warp each, or a row by several blocks: every architecture.
//
// A block takes a slice of the row tile by tile. The next tile's logits are on their way meanwhile: each
// thread copies what it alone will read, so the ring needs no barrier. Then the block closes the row, and
// emits the gradient from the last tile, whose exponentials are in registers, to the first; those before are
// read again, from the second-level cache, and computed again, with the same bits; rows of the mixture family
// are swept backwards and emitted forwards. Several blocks exchange their tiles' sums through memory. A block
// draws its (row, part) as a ticket, in order: a block waits only for blocks that have begun.
#pragma once
#include "close.h"
#include "exchange.h"
#include "fetch.h"

namespace kd {
namespace KD_LEVEL {

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

// A block's or a warp's slice of a row, from its logits to its gradient.
template <class G, class Family, int kB, int kO> struct Slice {
  using T = Team<G>;
  using TileOf = Tile<G, Family, kB, kO>;
  const Job &job;
  char *const memory;
  Scratch<G> &scratch;
  const RowAt &at;
  TileOf tile;
  const bool ahead;  // the next tile is fetched while one is computed; else there is room for one at a time

  KD_DEVICE Slice(const Job &job, char *memory, Scratch<G> &scratch)
      : job(job),
        memory(memory),
        scratch(scratch),
        at(scratch.row[0]),
        tile(job, scratch, at),
        ahead(job.stages > 1) {}

  KD_DEVICE TeamMemory<G> here() const {
    return TeamMemory<G>(gpu::from_here(memory), job.parts * job.tiles, job.tiles);
  }
  // Tile t's place among the row's.
  KD_DEVICE int part_of(int t) const { return scratch.part * scratch.tiles + t; }
  KD_DEVICE RowParts parts_of(const TeamMemory<G> &own) const {
    return {own.parts,  own.hards,    own.stats, own.factors, job.parts * scratch.tiles,
            part_of(0), scratch.tiles};
  }
  // Where the row's loss goes, of the block that writes it.
  KD_DEVICE double *loss() const { return scratch.part == 0 ? job.call.loss + scratch.number : nullptr; }
  KD_DEVICE bool last() const { return scratch.part == job.parts - 1; }

  KD_DEVICE void turn_to(int t) {
    tile.turn_to(scratch.from + t * G::kTile, scratch.to, here().logits + t % job.stages * TileOf::kBytes);
  }
  // Always a group of copies, for copy_wait to count.
  KD_DEVICE void fetch(int t) {
    if (t >= 0 && t < scratch.tiles) {
      turn_to(t);
      fetch_own(tile);
    }
    gpu::copy_commit();
  }
  KD_DEVICE void arrive() const {
    if (ahead)
      gpu::copy_wait<1>();
    else
      gpu::copy_wait<0>();
  }

  // A row of weight 0.
  KD_DEVICE void put_zero_slice() const {
    if (scratch.part == 0 && T::thread() == 0) put_nothing(job.call, scratch.number);
    const int from = scratch.from * kRun - at.offset, to = scratch.to * kRun - at.offset;
    put_zeros(job, at, from < 0 ? 0 : from, last() ? -1 : to, G::kThreads);
  }

  // The first sweep, tile by tile, and the row's close; once more where the references were far off.
  KD_DEVICE void sweep() {
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
  }

  // The second sweep, from the last tile, whose logits are still in their slot, to the first; and its close.
  KD_DEVICE void sweep_again() {
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

  // The gradient, from the tile that was swept last, which the thread holds; the one before it may still be
  // in its slot as well.
  KD_DEVICE void put_gradient() {
    const float label_gradient = job.hard ? float(scratch.label_gradient) : 0;
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
    if (last()) put_zeros(job, at, job.call.vocab, -1, G::kThreads);
  }
};

// The row and the slice of it that this team takes, by one thread.
template <class G> KD_DEVICE void take_row(const Job &job, int team, Scratch<G> &scratch) {
  int64_t row = gpu::block() * G::kTeams + team;
  scratch.part = scratch.again = 0;
  if (job.parts > 1) {
    const uint32_t ticket = gpu::next_ticket(job.tickets);
    row = ticket / job.parts;
    scratch.part = ticket % job.parts;
  }
  scratch.number = row;
  if (row >= job.call.rows) return;
  const RowAt at = look_up(job, row);
  const int slice = (at.chunks + job.parts - 1) / job.parts, from = slice * scratch.part;
  scratch.row[0] = at;
  scratch.from = from;
  scratch.to = from + slice < at.chunks ? from + slice : at.chunks;
  scratch.tiles = slice > G::kTile ? (slice + G::kTile - 1) / G::kTile : 1;
}

template <class G, class Family, int kB, int kO>
KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads *G::kTeams,
                           (Family::kNumbers == 2 ? 384 : 512) / (G::kThreads * G::kTeams))
    loss_rows(const KD_PARAM Job job) {
  const int team = gpu::thread() / G::kThreads;
  char *const memory = gpu::shared() + team * job.team_bytes;
  Scratch<G> &scratch = *(Scratch<G> *)memory;
  if (Team<G>::thread() == 0) take_row(job, team, scratch);
  Team<G>::sync();
  if (scratch.number >= job.call.rows) return;
  Slice<G, Family, kB, kO> slice(job, memory, scratch);
  if (slice.at.weight == 0) return slice.put_zero_slice();
  slice.sweep();
  if constexpr (Family::kTwice)
    if (!scratch.lost) slice.sweep_again();
  if (!scratch.lost && job.call.grad) slice.put_gradient();
}

}  // namespace KD_LEVEL
}  // namespace kd

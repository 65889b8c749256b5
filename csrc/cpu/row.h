// A row's way through the stages, block by block.
#pragma once
#include "careful.h"
#include "second.h"

namespace kd {
namespace KD_LEVEL {
namespace {

struct Range { int64_t from, to; };  // of a row's blocks

template <class Real, class Family> class RowPath {
 public:
  explicit RowPath(const Rows<Real> &rows) : rows(rows) {
    if constexpr (Family::kTwice) mix_ = narrowed(rows.plan.mixture, Real());
  }
  const Rows<Real> &rows;

  // Reals of a block's slot: what the family keeps, and the hard term's weights.
  int64_t slot_size() const {
    return (KeptArrays<Family, Real>::arrays(rows.plan) + rows.hard) * kSlot<Real>;
  }

  void sweep_blocks(RowState &s, Range range, Room<Real> &room) const {
    const double ref = s.closed.shift / rows.plan.k;
    bool lost = false;
    for (int64_t i = range.from; i < range.to && !lost; i++) {  // nothing after a block that is lost is used
      const Slot slot = slot_of(i, range, room);
      rows.with_block(s.number, i, room, [&](auto *z, const auto &x) {
        if (rows.hard) s.hards[i] = rows.hard_block(z, x.n, slot.hard);
        if (rows.plan.only_careful) return;
        const Block<Family, Real> block{slot.kept, s.parts + i, rows.entropies ? s.stats + i : nullptr,
                                        room.base, room.other};
        measure_block(x, rows.plan, s.closed.refine ? &ref : nullptr, block);
        lost = s.parts[i].care == kLost;
      });
    }
  }

  void close(RowState &s, Room<Real> &room) const {
    bool lost = rows.plan.only_careful;
    for (int64_t i = 0; i < rows.blocks && !lost; i++) lost = s.parts[i].care == kLost;
    const bool again = s.closed.refine;
    s.closed = Closed();
    if (!lost) s.closed = close_row<Family>(s.parts, int(rows.blocks), rows.plan);
    if (again) s.closed.refine = false;
    s.closed.lost |= lost;
    if (!Family::kTwice && !s.closed.lost && !s.closed.refine)
      put_value(rows, s, s.closed.value, nullptr, room);
  }

  // The second sweep, backwards, as the last block's slot is still that of the first sweep; and its close.
  void sweep_again(RowState &s, Range range, Room<Real> &room) const {
    for (int64_t i = range.to - 1; i >= range.from; i--) {
      const Slot slot = slot_of(i, range, room);
      const bool kept = fits(i, range, room) || i == range.to - 1;
      rows.with_block(s.number, i, room, [&](auto *, const auto &x) {
        second(x, s.closed, kept, {slot.kept, s.parts + i, nullptr, room.base, room.other});
      });
    }
  }
  void close_again(RowState &s, Room<Real> &room) const {
    for (int64_t i = 0; i < rows.blocks; i++) s.closed.lost |= s.parts[i].care == kLost;
    if (!s.closed.lost) close_second(s.parts, int(rows.blocks), rows.plan.mixture, s.closed);
    if (!s.closed.lost) put_value(rows, s, s.closed.value, nullptr, room);
  }

  // From the block that was swept last, whose slot is still its own.
  void emit_blocks(const RowState &s, Range range, Room<Real> &room, bool streaming) const {
    const Emission how = rows.emission(s, streaming);
    for (int64_t turn = range.from; turn < range.to; turn++) {
      const int64_t i = Family::kTwice ? turn : range.from + range.to - 1 - turn;
      const Slot slot = slot_of(i, range, room);
      const bool there = fits(i, range, room), kept = there || turn == range.from,
                 hard_kept = there || i == range.to - 1;
      if (!kept || (rows.hard && !hard_kept)) restore(s, i, slot, kept, room);
      const Part &p = s.parts[i];
      if (p.empty()) slot.kept.clear();
      const Coefficients k = coefficients_of<Family>(p, s.closed, rows.plan, how.soft);
      slot.kept.gradient(k, p, rows.length(i), [&](const auto &gradient) {
        put_block(rows, s, i, gradient, slot.hard, how, room);
      });
    }
  }

 private:
  // Where a block keeps what its gradient is made of, and the hard term's weights.
  struct Slot {
    KeptArrays<Family, Real> kept;
    Real *hard;
    Slot(Real *room, const Plan &plan)
        : kept(room, plan), hard(room + KeptArrays<Family, Real>::arrays(plan) * kSlot<Real>) {}
  };
  static bool fits(int64_t i, Range range, const Room<Real> &room) { return i - range.from < room.capacity; }
  Slot slot_of(int64_t i, Range range, Room<Real> &room) const {
    return {fits(i, range, room) ? room.workspace + (i - range.from) * slot_size() : room.slot, rows.plan};
  }

  // kept: what the first sweep left is still in the slot.
  template <class S>
  void second(const Logits<S> &x, const Closed &row, bool kept, const Block<Family, Real> &to) const {
    if constexpr (Family::kTwice) {
      if (to.part->empty()) return;
      Part again = *to.part;
      const Block<Family, Real> first{to.kept, &again, nullptr, to.wide_base, to.wide_other};
      if (!kept) sweep(again.care, x, rows.plan, first);
      sweep_second(x, rows.plan, mix_, row, to);
    }
  }

  // What a slot had, with the same bits: the hard term's weights, and, unless they are kept, the family's
  // arrays.
  void restore(const RowState &s, int64_t i, const Slot &slot, bool kept, Room<Real> &room) const {
    rows.with_block(s.number, i, room, [&](auto *z, const auto &x) {
      Part p = s.parts[i];
      const Block<Family, Real> block{slot.kept, &p, nullptr, room.base, room.other};
      if (rows.hard) rows.hard_block(z, x.n, slot.hard);
      if (kept) return;
      if (Family::kTwice)
        second(x, s.closed, false, block);
      else if (!p.empty())
        sweep(p.care, x, rows.plan, block);
    });
  }

  Mixed<Real> mix_{};
};

// A row by one thread.
template <class Real, class Family>
void run_row(const RowPath<Real, Family> &path, RowState &s, int64_t row, Room<Real> &room, bool streaming) {
  const Range all{0, path.rows.blocks};
  if (!path.rows.begin(s, row)) return;
  do {
    path.sweep_blocks(s, all, room);
    path.close(s, room);
  } while (s.closed.refine);
  if (Family::kTwice && !s.closed.lost) {
    path.sweep_again(s, all, room);
    path.close_again(s, room);
  }
  if (s.closed.lost)
    careful_row(path.rows, s, room, streaming);
  else if (path.rows.c.grad)
    path.emit_blocks(s, all, room, streaming);
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

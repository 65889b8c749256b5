// A call: its threads, their workspace, and the rows or blocks that each takes.
#pragma once
#include <cstdlib>
#include "row.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kd {
namespace KD_LEVEL {
namespace {

// Of the parallel region we are in, which may have fewer threads than were asked for.
#if defined(_OPENMP)
inline int thread_number() { return omp_get_thread_num(); }
inline int thread_count() { return omp_get_num_threads(); }
#else
inline int thread_number() { return 0; }
inline int thread_count() { return 1; }
#endif

// Whether a gradient goes past the caches; its pages are asked for in few faults then.
inline bool streams(const kd_call &c) {
  const int64_t all = c.rows * c.grad_width * element_size(c.grad_dtype);
  if (!c.grad || !c.fresh || all <= (int64_t(8) << 20)) return false;
#if defined(__linux__)
  const uintptr_t page = uintptr_t(2) << 20, lo = ((uintptr_t)c.grad + page - 1) / page * page,
                  hi = ((uintptr_t)c.grad + all) / page * page;
  if (hi > lo) madvise((void *)lo, hi - lo, MADV_HUGEPAGE);
#endif
  return true;
}

// Threads of a call; split: they share each row's blocks, as rows are fewer than threads.
struct Threads {
  int count;
  bool split;
};
inline Threads threads_of(const kd_call &c, int64_t blocks) {
  const bool small = c.rows * c.vocab < 32768;  // not worth waking a thread for
  const int count = small || c.threads < 1 ? 1 : c.threads;
  return {count, c.rows < 4 * count && blocks >= 2 * count && count > 1};
}

// Where threads keep what blocks leave: bytes for each, in the gradient's last `tail` rows, or in memory of
// their own where there is no tail.
struct Workspace {
  int64_t bytes = 0, tail = 0;
  char *start = nullptr;  // of the tail
};

// The workspace is the gradient's last rows where it is `fresh` and rows are not split: these are written
// last, without a workspace. Else it is allocated, for all threads the larger of 0.9 % of the gradient and
// 512 KiB. A workspace for all blocks that takes a share a of the rows saves 1 - a of the second
// exponentials; for a fraction f of the blocks it saves f - a f^2, most at f = 1 / (2 a). So it never takes
// more than half of the rows.
inline Workspace plan_workspace(const kd_call &c, const Threads &threads, int64_t blocks,
                                int64_t slot_bytes) {
  const int64_t row_bytes = c.grad_width * element_size(c.grad_dtype), all = c.rows * row_bytes;
  const int64_t share = threads.split ? (blocks + threads.count - 1) / threads.count : blocks;
  const int64_t want = share > 1 && c.grad ? share * slot_bytes + 64 : 0;
  Workspace w;
  if (!want) return w;
  if (c.fresh && !threads.split) {
    w.tail = smaller((threads.count * want + row_bytes - 1) / row_bytes, c.rows / 2);
    w.bytes = smaller(want, w.tail * row_bytes / threads.count);
    w.start = (char *)c.grad + (all - w.tail * row_bytes);
    if (w.bytes >= slot_bytes + 64) return w;
  }
  const int64_t most = at_least(int64_t(double(all) * .009), int64_t(512) << 10) / threads.count;
  w.tail = 0;
  w.bytes = smaller(want, most);
  return w;
}

// A thread's share of the workspace, as its room has it; memory of its own is freed with it.
class OwnWorkspace {
 public:
  template <class Real>
  OwnWorkspace(const Workspace &w, int64_t slot_bytes, Room<Real> &room)
      : own_(!w.tail && w.bytes ? std::malloc(w.bytes) : nullptr) {
    char *const start = w.tail ? w.start + thread_number() * w.bytes : (char *)own_;
    if (!start) return;
    room.workspace = (Real *)round_up((uintptr_t)start, 64);
    room.capacity = at_least((w.bytes - 64) / slot_bytes, 0);
  }
  OwnWorkspace(const OwnWorkspace &) = delete;
  ~OwnWorkspace() { std::free(own_); }

 private:
  void *const own_;
};

// The parts of a row's blocks.
struct RowMemory {
  RowState state;
  template <class Real>
  explicit RowMemory(const Rows<Real> &rows)
      : state{allocate<Part>(rows.blocks), allocate<SmoothPart>(rows.blocks),
              rows.entropies ? allocate<StatPart>(rows.blocks) : nullptr} {}
  RowMemory(const RowMemory &) = delete;
  ~RowMemory() {
    std::free(state.parts);
    std::free(state.hards);
    std::free(state.stats);
  }
  template <class T> static T *allocate(int64_t n) {
    return n > 0 ? (T *)std::malloc(n * sizeof(T)) : nullptr;
  }
};

// A row by all threads of the parallel region, a range of its blocks each.
template <class Real, class Family>
void run_split(const RowPath<Real, Family> &path, RowState &shared, int64_t row, Room<Real> &room,
               bool streaming) {
  const int64_t blocks = path.rows.blocks, each = (blocks + thread_count() - 1) / thread_count();
  const bool leads = thread_number() == 0;
  const int64_t from = smaller(thread_number() * each, blocks);
  const Range mine{from, smaller(from + each, blocks)};
#pragma omp barrier
  if (leads && !path.rows.begin(shared, row)) shared.weight = 0;
#pragma omp barrier
  if (shared.weight == 0) return;
  do {
    path.sweep_blocks(shared, mine, room);
#pragma omp barrier
    if (leads) path.close(shared, room);
#pragma omp barrier
  } while (shared.closed.refine);
  if (Family::kTwice && !shared.closed.lost) {
    path.sweep_again(shared, mine, room);
#pragma omp barrier
    if (leads) path.close_again(shared, room);
#pragma omp barrier
  }
  if (!shared.closed.lost) {
    if (path.rows.c.grad) path.emit_blocks(shared, mine, room, streaming);
  } else if (leads) {
    careful_row(path.rows, shared, room, streaming);
  }
}

// A row by one thread, or by all of the parallel region. One with a temperature of its own is a call of its
// own.
template <class Real, class Family>
void run_one(const RowPath<Real, Family> &path, bool split, RowState &s, int64_t row, Room<Real> &room,
             bool streaming) {
  const auto with = [&](const RowPath<Real, Family> &path) {
    if (split)
      run_split(path, s, row, room, streaming);
    else
      run_row(path, s, row, room, streaming);
  };
  if (!path.rows.c.temperatures) return with(path);
  const kd_call own = at_own_temperature(path.rows.c, row);
  const Plan plan = make_plan(own, sizeof(Real) == 8);
  const Rows<Real> rows(own, plan);
  with(RowPath<Real, Family>(rows));
}

template <class Real, class Family> void run(const kd_call &c, const Plan &plan) {
  const Rows<Real> rows(c, plan);
  const RowPath<Real, Family> path(rows);
  const int64_t slot_bytes = path.slot_size() * sizeof(Real);
  const Threads threads = threads_of(c, rows.blocks);
  const Workspace workspace = plan_workspace(c, threads, rows.blocks, slot_bytes);
  const bool streaming = streams(c);
  const int64_t chunk = at_least(1, smaller(16, c.rows / (8 * threads.count))), tail = workspace.tail;
  RowMemory shared(rows);
#pragma omp parallel num_threads(threads.count) if (threads.count > 1)
  {
    Room<Real> room;
    const OwnWorkspace own(workspace, slot_bytes, room);
    if (threads.split) {
      for (int64_t row = 0; row < c.rows; row++) run_one(path, true, shared.state, row, room, streaming);
    } else {
      RowMemory mine(rows);
#pragma omp for schedule(dynamic, chunk)
      for (int64_t row = 0; row < c.rows - tail; row++)
        run_one(path, false, mine.state, row, room, streaming);
      if (tail) room.capacity = 0;  // the workspace's rows are what is written now
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = c.rows - tail; row < c.rows; row++)
        run_one(path, false, mine.state, row, room, streaming);
    }
    stream_fence();
  }
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

// Which kernel runs a call, and with what geometry: every choice in one place, with its reason. Knows no
// device but its figures.
//
// What a row keeps of its exponentials (em, et) is computed once where its tiles are in registers until it is
// closed: a tile is 32 classes to a thread, whose em and et then take 32 or 64 of the 128 registers that two
// blocks of 256 threads leave to each. So a row takes as many blocks as it has tiles, up to a point. Two
// blocks to a multiprocessor, because one exchanges its sums while the other computes.
#pragma once
#include "cluster.h"
#include "rows.h"

namespace kd {
namespace KD_LEVEL {

// A thread takes 32 classes, or 24 where two numbers of each are kept; the rows' kernels, which keep track of
// more, have fewer threads then, with more registers to each. In tests few threads, so that a host can run
// them.
template <class Family> struct Sizes {
#if defined(KD_TEST_GEOMETRY)
  using WarpRows = Geometry<32, 1, 2>;
  using BlockRows = Geometry<64, 1>;
  using Cluster = Geometry<64, 1>;
  using WideCluster = Geometry<64, 2>;
#else
  static constexpr int kChunks = Family::kNumbers == 2 ? 3 : 4;
  using WarpRows = Geometry<32, kChunks, kChunks>;
  using BlockRows = Geometry<64 * kChunks, kChunks>;
  using Cluster = Geometry<256, kChunks>;
  using WideCluster = Geometry<512, kChunks>;
#endif
};
#if defined(KD_TEST_GEOMETRY)
using CarefulRows = Geometry<64, 1>;
constexpr int kMostCluster = 4, kMostTilesOfRow = 64;
#else
using CarefulRows = Geometry<256, 1>;
constexpr int kMostCluster = kMostBlocks, kMostTilesOfRow = 256;
#endif
// blocks to a row by tickets: their states are read by each of them
constexpr int kMostParts = 32;
// of a block's slice; below, an exchange costs more than it saves
constexpr int kFewestChunks = 256;
constexpr int kReserved = 1024;  // bytes of shared memory that a block takes besides

// A measurement's choices in place of the plan's own, in the whole process (kd_tune); 0: none.
struct Tuning { int32_t wide, stages; };
inline Tuning tuning{};

enum Kind : int32_t { kCarefulRows, kWarpRows, kBlockRows, kCluster, kWideCluster };

inline int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int host_size(int32_t dtype) { return dtype == KD_F32 ? 4 : 2; }
inline bool has_transform(const kd_call &c) {
  return Transform<float>(c.student_scale, c.student_softcap).any() ||
         Transform<float>(c.teacher_scale, c.teacher_softcap).any();
}
// Bytes of a logit in shared memory.
inline int kept_size(const kd_call &c, int32_t dtype) { return has_transform(c) ? 4 : host_size(dtype); }

// Of a row, wherever it begins: one more than its classes ask for, unless all rows begin on 16 bytes.
inline int64_t chunks_of(const kd_call &c) {
  const int zs = host_size(c.student_dtype), vs = host_size(c.teacher_dtype), size = zs < vs ? zs : vs;
  const int64_t *stride = vs < zs ? c.teacher_stride : c.student_stride;
  const bool even = (uintptr_t)(vs < zs ? c.teacher : c.student) % 16 == 0 && stride[0] * size % 16 == 0 &&
                    stride[1] * size % 16 == 0;
  return over(c.vocab + (even ? 0 : kRun - 1), kRun);
}

// The rows of student and teacher lie alike: their chunks begin on 16 bytes in both, which is what a bulk
// copy asks for.
inline bool alike(const kd_call &c) {
  const int zs = host_size(c.student_dtype), vs = host_size(c.teacher_dtype), run = 16 / (zs > vs ? zs : vs);
  const uintptr_t z = (uintptr_t)c.student, v = (uintptr_t)c.teacher;
  if (z % zs || v % vs || (z / zs - v / vs) % run) return false;
  for (int i = 0; i < 2; i++)
    if ((c.student_stride[i] - c.teacher_stride[i]) % run) return false;
  return true;
}

template <class G> int memory_bytes(int parts_of_row, int tiles) {
  return int((intptr_t)TeamMemory<G>((char *)0, parts_of_row, tiles).logits);
}
template <class G> int block_memory_bytes() { return (sizeof(BlockMemory<G>) + 127) / 128 * 128; }

template <class G> void plan_rows(const kd_call &c, const kd_figures &f, int parts, kd_geometry &g) {
  const int size = kept_size(c, c.student_dtype) + kept_size(c, c.teacher_dtype),
            slot = G::kTile * kRun * size;
  g.parts = parts;
  g.tiles = int(over(over(chunks_of(c), parts), G::kTile));
  const int memory = memory_bytes<G>(parts * g.tiles, g.tiles);
  g.stages = g.tiles > 1 && G::kTeams * (memory + 2 * slot) <= f.shared_per_block ? 2 : 1;
  g.threads = G::kThreads * G::kTeams;
  g.cluster = 1;
  g.shared = G::kTeams * (memory + g.stages * slot);
  g.blocks = over(c.rows, G::kTeams) * parts;
}

// False where a slice of both rows does not fit twice into shared memory.
template <class G> bool plan_cluster(const kd_call &c, const kd_figures &f, int blocks, kd_geometry &g) {
  const int size = host_size(c.student_dtype) + host_size(c.teacher_dtype), slot = G::kTile * kRun * size,
            memory = block_memory_bytes<G>();
  const int beside = 512 / G::kThreads;                  // blocks to a multiprocessor that registers allow
  const int stages = tuning.stages ? tuning.stages : 3;  // one row being read, one waiting, one on its way
  for (int n = beside > 1 ? 2 : 1; n >= 1; n--) {
    const int room = f.shared_per_processor / n - kReserved,
              most = room < f.shared_per_block ? room : f.shared_per_block;
    g.stages = (most - memory) / slot;
    if (g.stages > stages) g.stages = stages;
    if (g.stages >= 2) break;
  }
  if (g.stages < 2) return false;
  g.parts = g.tiles = 1;
  g.cluster = blocks;
  g.threads = G::kThreads;
  g.shared = memory + g.stages * slot;
  // times the clusters that fit: the launcher asks the device
  g.blocks = blocks;
  return true;
}

// False where no kernel takes the call.
template <class Family>
bool make_geometry(const kd_call &c, const Plan &plan, const kd_figures &f, kd_geometry &g) {
  using WarpRows = typename Sizes<Family>::WarpRows;
  using BlockRows = typename Sizes<Family>::BlockRows;
  using Cluster = typename Sizes<Family>::Cluster;
  using WideCluster = typename Sizes<Family>::WideCluster;
  g = {};
  const int64_t chunks = chunks_of(c);
  g.kind = kCarefulRows;
  if (plan.only_careful) return true;
  if (chunks <= WarpRows::kTile) {
    g.kind = kWarpRows;
    plan_rows<WarpRows>(c, f, 1, g);
    return true;
  }
  // more blocks to a row where rows are too few for the device
  const auto widen = [&](int64_t blocks, int64_t most) {
    while (2 * blocks <= most && c.rows * blocks < f.processors && chunks / (2 * blocks) >= kFewestChunks)
      blocks *= 2;
    return int(blocks);
  };
  const int family = f.capability / 10;
  // The other families have no distributed shared memory to speak of: 99 KB to a block. A bulk copy leaves
  // logits as they are, with no room beside them for fp32.
  if ((family == 9 || family == 10) && alike(c) && !has_transform(c)) {
    const auto by_cluster = [&](auto cluster, Kind kind) {
      using G = decltype(cluster);
      int64_t blocks = 1;
      // powers of two: others leave multiprocessors idle
      while (blocks * G::kTile < chunks && blocks < kMostCluster) blocks *= 2;
      g.kind = kind;
      return blocks * G::kTile >= chunks && plan_cluster<G>(c, f, widen(blocks, kMostCluster), g);
    };
    if (!tuning.wide && by_cluster(Cluster(), kCluster)) return true;
    if (by_cluster(WideCluster(), kWideCluster)) return true;
  }
  // blocks of a row wait for each other: half of what is surely resident, one to a multiprocessor
  const int64_t most =
      f.processors / 2 < kMostParts ? (f.processors / 2 > 1 ? f.processors / 2 : 1) : kMostParts;
  g.kind = kBlockRows;
  const int64_t tiles = over(chunks, BlockRows::kTile);
  plan_rows<BlockRows>(c, f, widen(tiles < most ? tiles : most, most), g);
  return g.parts * g.tiles <= kMostTilesOfRow && g.shared <= f.shared_per_block;
}
inline bool make_geometry(const kd_call &c, const Plan &plan, const kd_figures &f, kd_geometry &g) {
  return with_family(plan, [&](auto family) { return make_geometry<decltype(family)>(c, plan, f, g); });
}

}  // namespace KD_LEVEL
}  // namespace kd

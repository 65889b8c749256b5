// A call as the kernels get it, a row of it, and the layout of a kernel.
#pragma once
#include "number.h"
#include "../math/transform.h"
#include "../row/row.h"

namespace kd {
namespace KD_LEVEL {

// Statistics of a tile: also the first classes that have the largest logits of the base and of the other.
struct TileStats : StatPart { double first_b = 0, first_o = 0; };

constexpr int kRun = 8;  // classes of a chunk: 16 bytes at 2 bytes each, 32 at 4
// The loss of a row that is lost, until careful_rows has computed it: a nan that no arithmetic returns.
constexpr int64_t kLostMark = 0x7ff8000000010571;
// Words of 8 bytes that blocks send each other: of a tile's sums; of its statistics, where entropies are
// asked for; of its second sweep. And the counters of a row's exchanges.
constexpr int kPartWords = sizeof(Part) / 8, kWords = kPartWords + sizeof(SmoothPart) / 8;
constexpr int kStatWords = sizeof(TileStats) / 8, kSecondWords = sizeof(SecondPart) / 8, kCounters = 4;

// How a kernel is laid out: kTeams rows to a block, kThreads threads to a row's tile, kChunks chunks to a
// thread.
template <int kThreads_, int kChunks_, int kTeams_ = 1> struct Geometry {
  static constexpr int kThreads = kThreads_, kChunks = kChunks_, kTeams = kTeams_, kWarps = kThreads / 32,
                       kTile = kThreads * kChunks;
  static_assert(kTeams == 1 || kThreads == 32,
                "several rows to a block: a warp to each, which needs no barrier of the block");
};

// A call, as the kernels get it.
struct Job {
  kd_call call;
  Plan plan;
  float c, c_low, tilt, reach;  // plan's, as the tiles take them
  int32_t parts, tiles;         // blocks to a row; the most tiles to a block
  int32_t stages, team_bytes;   // of logits in shared memory; shared memory of a team
  int32_t hard, all;            // the hard term is asked for; every row is one for careful/
  int32_t smooth, transformed;  // label smoothing is; one of the rows has a transform
  int32_t entropies;            // asked for: statistics, or the cross entropy
  int32_t second_words;         // kSecondWords of a row that is swept twice, else 0
  Transform<float> student, teacher;
  // [1 + kCounters rows]: the next (row, part); arrivals at a row's exchanges. Zero at launch
  uint32_t *tickets;
  // [rows][parts * tiles][kWords], then, mixture family, [kSecondWords], then, statistics, [kStatWords]
  double *state;
  Mixed<float> mix;  // plan's
};

// Where a row lies, and its weight and label: one thread looks them up for all.
struct RowAt {
  const char *student, *teacher;
  char *grad;
  int offset, chunks;
  double weight;
  // -1 for one outside of the vocabulary, whose logit is nan
  int label;
  float label_logit;
};
KD_DEVICE int64_t element_of(const kd_call &c, const int64_t *stride, int64_t row) {
  return row < c.inner ? row * stride[1] : row / c.inner * stride[0] + row % c.inner * stride[1];
}
KD_DEVICE int size_of(int32_t dtype) { return dtype == KD_F32 ? 4 : 2; }
KD_DEVICE RowAt locate(const Job &job, int64_t row) {
  const kd_call &c = job.call;
  RowAt at{};
  const int zs = size_of(c.student_dtype), vs = size_of(c.teacher_dtype);
  at.student = (const char *)c.student + element_of(c, c.student_stride, row) * zs;
  at.teacher = (const char *)c.teacher + element_of(c, c.teacher_stride, row) * vs;
  if (c.grad) at.grad = (char *)c.grad + element_of(c, c.grad_stride, row) * zs;
  at.offset = vs < zs ? int((uintptr_t)at.teacher % 16) / vs : int((uintptr_t)at.student % 16) / zs;
  at.chunks = (at.offset + int(c.vocab) + kRun - 1) / kRun;
  return at;
}

// The coefficients of a tile's gradient, as floats. lone: the factor of e where the teacher masks the class;
// hard: that of the hard term's exponential; student: of the mixture family, what turns the exponential of
// the student's logit as emit_whole takes it into q; end: as Coefficients has it.
struct Factors { float A, B, C, lone, hard, student, end; };

// The parts of a row that a block closes: n of them, of which those of its own tiles begin at `mine`.
struct RowParts {
  Part *parts;
  SmoothPart *hards;
  TileStats *stats;
  Factors *factors;  // of its own tiles
  int n, mine, tiles;
};

}  // namespace KD_LEVEL
}  // namespace kd

// The CPU library. This file is compiled once for each instruction-set level (KD_ISA = v2, v3, v4 on x86-64,
// base elsewhere) and once more without KD_ISA for the C functions, which ask the processor at run time which
// level to call.
//
// A row goes through three phases, each over its blocks of classes, which stay in the first-level cache:
//     sweep   one read of both rows: sums of the block, and its e, em, et (row.h) into the workspace
//     close   the blocks are merged in order: the value, and three coefficients for each block
//     emit    the gradient as a linear combination of what was kept, written past the caches
// Logits with a transform are transformed as a block is fetched; what a softcap and label
// smoothing do to a gradient class by class comes between close and emit. Rows of the mixture family are
// swept twice, from the second-level cache, and the second sweep is what is kept. The workspace is the tail
// of the gradient itself, whose rows are written last: no memory is asked for beyond the gradient. Blocks
// that find no room are swept again before they are emitted, with the same bits. Threads take rows, or, where
// there are fewer rows than threads, blocks of one row.
#include "api.h"

#if defined(KD_ISA)

#define KD_CONCAT_(a, b) a##b
#define KD_CONCAT(a, b) KD_CONCAT_(a, b)
#define KD_LEVEL KD_CONCAT(level_, KD_ISA)

#include <cstdlib>
#include "cpu/rows.h"
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

template <class T> T *allocate(int64_t n) { return n > 0 ? (T *)std::malloc(n * sizeof(T)) : nullptr; }

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

template <class Real> void run(const kd_call &c, const Plan &plan) {
  const RowJob<Real> job(c, plan);
  const int64_t blocks = job.blocks(), row_bytes = c.grad_width * element_size(c.grad_dtype),
                all = c.rows * row_bytes;
  const bool streaming = streams(c);
  const bool small = c.rows * c.vocab < 32768;  // not worth waking a thread for
  const int threads = small || c.threads < 1 ? 1 : c.threads;
  const bool split = c.rows < 4 * threads && blocks >= 2 * threads && threads > 1;

  // The workspace: the gradient's last rows, which are written last and have none themselves, or else at most
  // 1 % of its size. A workspace for all blocks that takes a share a of the rows saves 1 - a of the second
  // exponentials; for a fraction f of the blocks it saves f - a f^2, most at f = 1 / (2 a). So it never takes
  // more than half of the rows.
  const int64_t share = split ? (blocks + threads - 1) / threads : blocks;
  int64_t want = share > 1 && c.grad ? share * job.slot_bytes() + 64 : 0, tail = 0, room = 0;
  if (want && c.grad && c.fresh && !split) {
    tail = smaller((threads * want + row_bytes - 1) / row_bytes, c.rows / 2);
    const int64_t found = smaller(want, tail * row_bytes / threads);
    if (found < job.slot_bytes() + 64)
      tail = 0;
    else
      want = found;
  }
  if (!tail) {
    const int64_t most = at_least(int64_t(double(all) * .009), int64_t(512) << 10) / threads;
    room = want ? smaller(share * job.slot_bytes() + 64, most) : 0;
  }
  char *const tail_start = tail ? (char *)c.grad + (all - tail * row_bytes) : nullptr;
  const int64_t chunk = at_least(1, smaller(16, c.rows / (8 * threads)));

  Part *shared_parts = split ? allocate<Part>(blocks) : nullptr;
  SmoothPart *shared_hard = split ? allocate<SmoothPart>(blocks) : nullptr;
  StatPart *shared_stats = split && job.entropies() ? allocate<StatPart>(blocks) : nullptr;
  typename RowJob<Real>::State shared{shared_parts, shared_hard, shared_stats, Row(), HardRow(), 1};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Desk<Real> desk;
    const int me = thread_number();
    void *own = room ? std::malloc(room) : nullptr;
    char *start = tail ? tail_start + me * want : (char *)own;
    if (start) {
      desk.workspace = (Real *)round_up((uintptr_t)start, 64);
      desk.capacity = ((tail ? want : room) - 64) / job.slot_bytes();
      if (desk.capacity < 0) desk.capacity = 0;
    }
    if (split) {
      const int64_t mine = (blocks + thread_count() - 1) / thread_count(), lo = smaller(me * mine, blocks),
                    hi = smaller(lo + mine, blocks);
      for (int64_t row = 0; row < c.rows; row++) {
        bool counts = true;
#pragma omp barrier
        if (me == 0) {
          shared.row = Row();
          shared.weight = job.begin(shared, row) ? shared.weight : 0;
        }
#pragma omp barrier
        counts = shared.weight != 0;
        while (counts) {
          job.sweep_blocks(shared, row, lo, hi, desk);
#pragma omp barrier
          if (me == 0) job.close(shared, row, desk);
#pragma omp barrier
          if (!shared.row.refine) break;
        }
        if (!counts) continue;
        if (job.mixed() && !shared.row.lost) {
          job.mix_blocks(shared, row, lo, hi, desk);
#pragma omp barrier
          if (me == 0) job.close_mixed_row(shared, row, desk);
#pragma omp barrier
        }
        if (!shared.row.lost) {
          if (c.grad) job.emit_blocks(shared, row, lo, hi, desk, streaming);
        } else if (me == 0)
          job.careful_row(shared, row, desk, streaming);
      }
    } else {
      Part *parts = allocate<Part>(blocks);
      SmoothPart *hard_parts = allocate<SmoothPart>(blocks);
      StatPart *stat_parts = job.entropies() ? allocate<StatPart>(blocks) : nullptr;
      typename RowJob<Real>::State s{parts, hard_parts, stat_parts, Row(), HardRow(), 1};
#pragma omp for schedule(dynamic, chunk)
      for (int64_t row = 0; row < c.rows - tail; row++)
        run_alone(job, s, row, desk, c.grad != nullptr, streaming);
      desk.capacity = tail ? 0 : desk.capacity;
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = c.rows - tail; row < c.rows; row++)
        run_alone(job, s, row, desk, c.grad != nullptr, streaming);
      std::free(parts);
      std::free(hard_parts);
      std::free(stat_parts);
    }
    std::free(own);
    stream_fence();
  }
  std::free(shared_parts);
  std::free(shared_hard);
  std::free(shared_stats);
}

// ---------------------------------------------------------------- log_softmax
template <class Real> void log_softmax_rows(const kd_log_softmax_call &c) {
  using F = typename Vec<Real>::F;
  constexpr int W = Vec<Real>::W;
  constexpr int64_t N = kBlock<Real>;
  const double k = 1 / c.temperature;
  const int64_t size = element_size(c.dtype), blocks = (c.vocab + N - 1) / N;
  const bool streaming = c.rows * c.vocab * size > (int64_t(8) << 20);
#pragma omp parallel for schedule(static) \
    num_threads(c.threads) if (c.rows * c.vocab >= 32768 && c.threads > 1)
  for (int64_t row = 0; row < c.rows; row++) {
    alignas(64) Real buffer[kSlot<Real>], up[kSlot<Real>];
    const char *x = (const char *)c.logits + row * c.logits_stride * size,
               *u = c.upstream ? (const char *)c.upstream + row * c.upstream_stride * size : nullptr;
    const auto fetch = [&](const char *p, int64_t i, Real *to) {
      const int64_t n = smaller(N, c.vocab - i * N);
      load_row(p, c.dtype, i * N, n, to);
      for (int64_t j = n; j < round_up(n, W); j++) to[j] = p == x ? Real(-INFINITY) : Real(0);
      return round_up(n, W);
    };
    // at T = inf every class that is not masked has the same logit
    const auto scaled = [&](F v, Real top) {
      return k > 0 ? (v - top) * Real(k) : select(v == Real(-INFINITY), v, v - v);
    };
    double top = -INFINITY, rest = 0, total = 0;
    bool broken = false;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t n = fetch(x, i, buffer);
      const double t = largest<Real>(buffer, n);
      if (t > top) {
        rest = top > -INFINITY ? (rest + 1) * std::exp(k > 0 ? (top - t) * k : 0) : 0;
      } else if (t > -INFINITY) {
        rest += 0;
      }
      const double next = t > top ? t : top;
      typename Vec<Real>::D others{}, ties{}, sums{};
      typename Vec<Real>::I nan{};
      for (int64_t j = 0; j < n; j += W) {
        const F v = load<F>(buffer + j), a = scaled(v, Real(next)) * Real(kLog2e);
        const F e = exp2_of_product(a, Real(1), Exp2<Real>::kFloor);
        nan |= v != v;
        others += __builtin_convertvector(select(a == Real(0), F{}, e), typename Vec<Real>::D);
        ties += __builtin_convertvector(select(a == Real(0), splat<F>(1), F{}), typename Vec<Real>::D);
      }
      for (int j = 0; j < W; j++) broken |= nan[j] != 0;
      rest += sum_of<Real>(others) + (sum_of<Real>(ties) - (t > top ? 1 : 0));
      top = next;
      if (u) {
        const int64_t m = fetch(u, i, up);
        for (int64_t j = 0; j < m; j += W)
          sums += __builtin_convertvector(load<F>(up + j), typename Vec<Real>::D);
        total += sum_of<Real>(sums);
      }
    }
    if (!std::isfinite(top)) broken = true;
    const Real log_total = broken ? Real(NAN) : Real(std::log1p(rest)), inverse = Real(total / (1 + rest));
    for (int64_t i = 0; i < blocks; i++) {
      fetch(x, i, buffer);
      if (u) fetch(u, i, up);
      store_row((char *)c.out + row * c.out_stride * size, c.dtype, i * N, smaller(N, c.vocab - i * N),
                streaming, Real(0), [&](int64_t j) {
                  const F a = scaled(load<F>(buffer + j), Real(top));
                  if (!u) return F(a - log_total);
                  const F a2 = a * Real(kLog2e), e = exp2_of_product(a2, Real(1), Exp2<Real>::kFloor);
                  return F((load<F>(up + j) - e * inverse + log_total * Real(0)) * Real(k));
                });
    }
    if (streaming) stream_fence();
  }
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

extern "C" {
int32_t KD_CONCAT(kd_loss_, KD_ISA)(kd_call *c) {
  using namespace kd::KD_LEVEL;
  const bool wide = c->student_dtype == KD_F64 || c->teacher_dtype == KD_F64;
  const Plan plan = make_plan(*c, wide);
  if (wide)
    run<double>(*c, plan);
  else
    run<float>(*c, plan);
  return KD_OK;
}
int32_t KD_CONCAT(kd_log_softmax_, KD_ISA)(const kd_log_softmax_call *c) {
  using namespace kd::KD_LEVEL;
  if (c->dtype == KD_F64)
    log_softmax_rows<double>(*c);
  else
    log_softmax_rows<float>(*c);
  return KD_OK;
}
}

#else  // ---------------------------------------------------------------- the C functions

#define KD_LEVEL dispatch
#include <cstdlib>
#if defined(KD_X86_LEVELS)
#include <cpuid.h>
#include <initializer_list>
#endif
#include "divergence.h"

#define KD_DECLARE(level)                        \
  extern "C" int32_t kd_loss_##level(kd_call *); \
  extern "C" int32_t kd_log_softmax_##level(const kd_log_softmax_call *);
KD_DECLARE(v2)
KD_DECLARE(v3)
KD_DECLARE(v4)
KD_DECLARE(base)

namespace {
#if defined(KD_X86_LEVELS)
// The x86-64 level of the processor whose registers the system saves. By cpuid, because compilers differ in
// the features that __builtin_cpu_supports knows by name.
int processor_level() {
  const auto bits = [](std::initializer_list<int> places) {
    uint32_t all = 0;
    for (int x : places) all |= 1u << x;
    return all;
  };
  uint32_t a = 0, b = 0, basic = 0, wide = 0, extended = 0, d = 0, saved = 0;
  if (!__get_cpuid(1, &a, &b, &basic, &d)) return 1;
  if (!__get_cpuid(0x80000001, &a, &b, &extended, &d)) extended = 0;
  if (!__get_cpuid_count(7, 0, &a, &wide, &b, &d)) wide = 0;
  if (basic & bits({27})) __asm__ volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));  // osxsave
  const auto within = [](uint32_t wanted, uint32_t has) { return (wanted & ~has) == 0; };
  // sse3, ssse3, cx16, sse4.1, sse4.2, popcnt
  const bool v2 = within(bits({0, 9, 13, 19, 20, 23}), basic) && within(bits({0}), extended);  // lahf
  const bool v3 = v2 && within(bits({12, 22, 27, 28, 29}), basic)  // fma, movbe, osxsave, avx, f16c
                  && within(bits({3, 5, 8}), wide) && within(bits({5}), extended)  // bmi1, avx2, bmi2; lzcnt
                  && within(bits({1, 2}), saved);                                  // xmm and ymm registers
  const bool v4 = v3 && within(bits({16, 17, 28, 30, 31}), wide)  // avx512: f, dq, cd, bw, vl
                  && within(bits({5, 6, 7}), saved);              // masks, zmm registers
  return v4 ? 4 : v3 ? 3 : v2 ? 2 : 1;
}
#endif

struct Level {
  const char *name;
  int32_t (*loss)(kd_call *);
  int32_t (*log_softmax)(const kd_log_softmax_call *);
};

// The best level that was built and that the processor has; "none" without one. KDKERNELS_CPU_ISA = v2 or
// v3 asks for less, to compare levels and to test them.
Level choose() {
#if defined(KD_X86_LEVELS)
  const char *asked = std::getenv("KDKERNELS_CPU_ISA");
  int has = processor_level();
  if (asked && asked[0] == 'v' && asked[1] - '0' < has) has = asked[1] - '0';
#if defined(KD_HAS_v4)
  if (has >= 4) return {"x86-64-v4", kd_loss_v4, kd_log_softmax_v4};
#endif
#if defined(KD_HAS_v3)
  if (has >= 3) return {"x86-64-v3", kd_loss_v3, kd_log_softmax_v3};
#endif
#if defined(KD_HAS_v2)
  if (has >= 2) return {"x86-64-v2", kd_loss_v2, kd_log_softmax_v2};
#endif
  return {"none", nullptr, nullptr};
#else
  return {"base", kd_loss_base, kd_log_softmax_base};
#endif
}
const Level &level() {
  static const Level chosen = choose();
  return chosen;
}
}  // namespace

#define KD_API extern "C" __attribute__((visibility("default")))

KD_API int32_t kd_loss(kd_call *c) {
  if (!c || c->rows < 0 || c->vocab <= 0 || c->inner <= 0 || !level().loss) return KD_BAD_CALL;
  if (c->labels) {
    for (int64_t r = 0; r < c->rows; r++) {
      const bool counts = !c->weight || c->weight[r] != 0;
      if (counts && (c->labels[r] < 0 || c->labels[r] >= c->vocab)) {
        c->bad_row = r;
        return KD_BAD_LABEL;
      }
    }
  }
  return c->rows ? level().loss(c) : int32_t(KD_OK);
}
KD_API int32_t kd_log_softmax(const kd_log_softmax_call *c) {
  return c->rows ? level().log_softmax(c) : int32_t(KD_OK);
}
KD_API int32_t kd_abi_version(void) { return KD_ABI_VERSION; }
KD_API int64_t kd_call_size(void) { return sizeof(kd_call); }
KD_API int64_t kd_log_softmax_call_size(void) { return sizeof(kd_log_softmax_call); }
KD_API const char *kd_families(void) { return kd::dispatch::kNames; }
KD_API const char *kd_isa(void) { return level().name; }
KD_API int kd_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

#endif

// The CPU library. This file is compiled once for each instruction-set level (KD_ISA = v2, v3, v4 on x86-64,
// base elsewhere) and once more without KD_ISA for the C functions, which ask the processor at run time which
// level to call.
//
// A row goes through its stages block by block, with blocks that stay in the first-level cache:
//     sweep   one read of both rows: sums of the block, and what its family keeps, into the workspace
//     close   the blocks are merged in order: the value, and the coefficients of each block
//     emit    the gradient as a function of what was kept, written past the caches
// Logits with a transform are transformed as a block is fetched; what a softcap and label smoothing do to a
// gradient class by class comes between close and emit. Rows of the mixture family are swept twice, from the
// second-level cache, and the second sweep is what is kept. The workspace is the tail of the gradient, whose
// rows are written last, or, where something else lies in that memory, allocated (cpu/run.h). Blocks that
// find no room are swept again before they are emitted, with the same bits. Threads take rows, or, where
// there are fewer rows than threads, blocks of one row.
#include "api.h"

#if defined(KD_ISA)

#define KD_CONCAT_(a, b) a##b
#define KD_CONCAT(a, b) KD_CONCAT_(a, b)
#define KD_LEVEL KD_CONCAT(level_, KD_ISA)

#include "cpu/log_softmax.h"
#include "cpu/run.h"

extern "C" {
int32_t KD_CONCAT(kd_loss_, KD_ISA)(kd_call *c) {
  using namespace kd::KD_LEVEL;
  const bool wide = c->student_dtype == KD_F64 || c->teacher_dtype == KD_F64;
  const Plan plan = make_plan(*c, wide);
  with_family(plan, [&](auto family) {
    if (wide)
      run<double, decltype(family)>(*c, plan);
    else
      run<float, decltype(family)>(*c, plan);
  });
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

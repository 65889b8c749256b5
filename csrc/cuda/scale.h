// x *= factor, a number on the device: a gradient times its upstream one.
#pragma once
#include "logits.h"

namespace kd {
namespace KD_LEVEL {

// The factor is read on the device; nothing is moved where it is 1.
struct ScaleJob {
  void *x;
  const void *factor;
  int64_t count;
  int32_t dtype, factor_dtype;
};

template <class G> KD_KERNEL KD_LAUNCH_BOUNDS(G::kThreads, 1) scale_all(const KD_PARAM ScaleJob job) {
  const double exact = job.factor_dtype == KD_F64 ? *(const double *)job.factor
                                                  : element((const char *)job.factor, 0, job.factor_dtype);
  const float factor = float(exact);
  if (factor == 1) return;
  const int64_t runs = (job.count + kRun - 1) / kRun, stride = gpu::blocks() * G::kThreads;
  for (int64_t r = gpu::block() * G::kThreads + gpu::thread(); r < runs; r += stride) {
    const int64_t i = r * kRun;
    char *x = (char *)job.x;
    float y[kRun];
    if (i + kRun <= job.count && (uintptr_t)x % 16 == 0) {
      if (job.dtype == KD_F32)
        unpack<4>(x + i * 4, false, y);
      else
        unpack<2>(x + i * 2, job.dtype == KD_F16, y);
    } else {
      for (int j = 0; j < kRun; j++) y[j] = i + j < job.count ? element(x, i + j, job.dtype) : 0;
    }
    KD_UNROLL for (int j = 0; j < kRun; j++) y[j] *= factor;
    put(x, i, job.count, job.dtype, y);
  }
}

}  // namespace KD_LEVEL
}  // namespace kd

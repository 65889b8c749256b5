// The CUDA library for host threads: csrc/cuda.cu as it is, with small blocks, on a device that a test
// describes.
#define KD_TEST_GEOMETRY 1
#define KD_ARCHS "host threads"
#include "../../csrc/cuda.cu"

#if !defined(KD_FAMILY)
extern "C" __attribute__((visibility("default"))) void kd_simt_device(const int *f) {
  gpu::device = {f[0], f[1], f[2], f[3], f[4]};
}
#endif

// The CUDA library for host threads: csrc/cuda.cu as it is, with small blocks, on a device that a test describes.
#define KD_TEST_GEOMETRY 1
#define KD_ARCHS "host threads"
#include "../../csrc/cuda.cu"

#if !defined(KD_SHAPE)
extern "C" __attribute__((visibility("default"))) void kd_simt_device(const int *figures) { std::memcpy(&gpu::device, figures, sizeof gpu::device); }
extern "C" __attribute__((visibility("default"))) int kd_simt_launches() { return gpu::device.launches; }
#endif

// A libcuda that does nothing and says that all went well: Triton's own driver loads, compiles, caches and launches over it as it would over
// an H100's. For filling Triton's cache, and for what a launch costs the host, on a machine without a GPU.
#include <stddef.h>
#include <stdint.h>

typedef int Result;

enum {  // CUdevice_attribute
  kSharedPerBlock = 8, kWarp = 10, kRegistersPerBlock = 12, kProcessors = 16, kMajor = 75, kMinor = 76, kSharedPerProcessor = 81,
  kRegistersPerProcessor = 82, kSharedOptIn = 97
};

int64_t kd_stub_launches;  // how many kernels were launched

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case kSharedPerBlock: *value = 48 << 10; break;
    case kWarp: *value = 32; break;
    case kRegistersPerBlock: case kRegistersPerProcessor: *value = 64 << 10; break;
    case kProcessors: *value = 132; break;
    case kMajor: *value = 9; break;
    case kMinor: *value = 0; break;
    case kSharedPerProcessor: *value = 228 << 10; break;
    case kSharedOptIn: *value = 227 << 10; break;
    default: *value = 1024;
  }
  return 0;
}
Result cuGetErrorString(int error, const char **text) { *text = "the libcuda that does nothing"; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
Result cuStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)3; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : attribute == 4 ? 100 : 0; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 16; return 0; }
Result cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
Result cuLaunchKernel(void) { kd_stub_launches++; return 0; }
Result cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { kd_stub_launches++; return 0; }

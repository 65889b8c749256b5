// The verbs of the host: what a device is, and launches on it. verbs.h includes it; tests/simt/verbs_host.h
// has these too.
#pragma once
#include <cuda_runtime.h>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

namespace gpu {

struct Shape {
  int64_t blocks;
  int threads, cluster, shared;
};

// What `ask` finds for a key, asked once in a process, as the driver takes longer to answer than to launch.
// An error is not kept.
template <class Key, class Value> class Remembered {
 public:
  template <class Ask> int get(const Key &key, Value &value, Ask ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(key);
    if (found != known_.end()) {
      value = found->second;
      return 0;
    }
    if (const int error = ask(value)) return error;
    known_.emplace(key, value);
    return 0;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> known_;
};
inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

// Clusters are spread over the device: two blocks of one would share a multiprocessor while others stand
// idle.
struct ClusterAttributes { cudaLaunchAttribute of[2]; };
inline cudaLaunchConfig_t config_of(const Shape &s, void *stream, ClusterAttributes &attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)s.blocks);
  config.blockDim = dim3(s.threads);
  config.dynamicSmemBytes = s.shared;
  config.stream = (cudaStream_t)stream;
  cudaLaunchAttribute *const of = attributes.of;
  of[0].id = cudaLaunchAttributeClusterDimension;
  of[0].val.clusterDim.x = s.cluster;
  of[0].val.clusterDim.y = of[0].val.clusterDim.z = 1;
  of[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
  of[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
  config.attrs = of;
  config.numAttrs = s.cluster > 1 ? 2 : 0;
  return config;
}
// A kernel may take all the shared memory that a block can have, and, where it is one of clusters, more than
// 8 blocks to a cluster. Once for a kernel and device: a limit for each call would be lowered by another
// thread between here and the launch.
template <class Kernel> int allow(Kernel *kernel, bool clusters) {
  static auto &allowed = *new Remembered<std::tuple<Kernel *, int>, bool>;
  bool done;
  const int device = current_device();
  return allowed.get({kernel, device}, done, [&](bool &ok) {
    int most = 0;
    cudaFuncAttributes own{};
    if (const int error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
      return error;
    if (const int error = cudaFuncGetAttributes(&own, kernel)) return error;
    if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               most - int(own.sharedSizeBytes)))
      return error;
    ok = true;
    return clusters ? int(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
                    : 0;
  });
}
template <class Kernel> int most_clusters(Kernel *kernel, const Shape &s, int *most) {
  static auto &known = *new Remembered<std::tuple<Kernel *, int, int, int, int>, int>;
  const int device = current_device();
  return known.get({kernel, device, s.threads, s.cluster, s.shared}, *most, [&](int &found) -> int {
    ClusterAttributes attributes{};
    Shape one = s;
    one.blocks = s.cluster;
    if (s.cluster > 1) {
      const cudaLaunchConfig_t config = config_of(one, nullptr, attributes);
      return cudaOccupancyMaxActiveClusters(&found, kernel, &config);
    }
    int processors = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const int error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, s.threads, s.shared);
    found *= processors;
    return error;
  });
}
template <class... Args>
int launch(void (*kernel)(Args...), const Shape &s, void *stream,
           const typename std::remove_const<Args>::type &...args) {
  ClusterAttributes attributes{};
  const cudaLaunchConfig_t config = config_of(s, stream, attributes);
  return cudaLaunchKernelEx(&config, kernel, args...);
}
inline int zero(void *p, int64_t bytes, void *stream) {
  return cudaMemsetAsync(p, 0, bytes, (cudaStream_t)stream);
}

template <class Figures> int figures(int device, Figures &f) {
  static auto &known = *new Remembered<int, Figures>;
  return known.get(device, f, [&](Figures &f) {
    int major = 0, minor = 0, error = 0;
    const auto ask = [&](int &to, cudaDeviceAttr what) {
      if (!error) error = cudaDeviceGetAttribute(&to, what, device);
    };
    ask(major, cudaDevAttrComputeCapabilityMajor);
    ask(minor, cudaDevAttrComputeCapabilityMinor);
    ask(f.processors, cudaDevAttrMultiProcessorCount);
    ask(f.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(f.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    f.capability = 10 * major + minor;
    return error;
  });
}
// The device of a call is made current, and the one before afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (cudaGetDevice(&before_) || before_ == device)
      before_ = -1;
    else
      cudaSetDevice(device);
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }

 private:
  int before_ = -1;
};
// kernel: one of the library's, of which all have code for the same architectures
template <class Kernel> const char *unavailable(Kernel *kernel, int device) {
  int count = 0, major = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count)) return cudaGetErrorString(error);
  if (device >= count) return "there is no such device";
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 8) return "its compute capability is below 8.0";
  const OnDevice here(device);
  cudaFuncAttributes own{};
  const cudaError_t error = cudaFuncGetAttributes(&own, kernel);
  if (!error) return nullptr;
  cudaGetLastError();  // nobody else's
  return error == cudaErrorNoKernelImageForDevice
             ? "the CUDA library was not compiled for its architecture (KDKERNELS_CUDA_ARCHS)"
             : cudaGetErrorString(error);
}
inline const char *error_text(int error) { return cudaGetErrorString((cudaError_t)error); }

}  // namespace gpu

// What the kernels ask of the hardware, each verb once. This is the device's; tests/simt/verbs_host.h has the
// same verbs for threads of the host, where a data race is one that a sanitizer can see.
#pragma once
#if !defined(__CUDACC__)
#include "verbs_host.h"  // found by the tests' include path
#else
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KD_KERNEL __global__ void
#define KD_DEVICE __device__ __forceinline__
#define KD_PARAM __grid_constant__
#define KD_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define KD_UNROLL _Pragma("unroll")
#if !defined(KD_ROLLED)
#define KD_ROLLED _Pragma("unroll 1")
#endif

namespace gpu {

// ---------------------------------------------------------------- where this thread is
KD_DEVICE int thread() { return threadIdx.x; }
KD_DEVICE int64_t block() { return blockIdx.x; }
KD_DEVICE int64_t blocks() { return gridDim.x; }
// the block's, as launched
KD_DEVICE char *shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// x, with nothing that depends on it computed before this point: else addresses are kept in registers through
// all of a row
template <class T> KD_DEVICE T from_here(T x) {
  asm volatile("" : "+l"(x));
  return x;
}

// ---------------------------------------------------------------- a block and its warps
KD_DEVICE void sync_block() { __syncthreads(); }
KD_DEVICE bool sync_block_any(bool x) { return __syncthreads_or(x); }
KD_DEVICE void sync_warp() { __syncwarp(); }
KD_DEVICE bool warp_any(bool x) { return __any_sync(~0u, x); }
// the first lane with x; -1 without one
KD_DEVICE int warp_first(bool x) { return __ffs(__ballot_sync(~0u, x)) - 1; }
template <class T> KD_DEVICE T warp_from(T x, int lane) { return __shfl_sync(~0u, x, lane); }

// Sums of several numbers over a warp, in a fixed order; every lane gets them.
template <class T, int N> KD_DEVICE void warp_sum(T (&x)[N]) {
  KD_UNROLL for (int step = 16; step; step /= 2) KD_UNROLL for (int i = 0; i < N; i++) x[i] +=
      __shfl_xor_sync(~0u, x[i], step);
}
template <class T> KD_DEVICE T warp_largest(T x) {  // b where a is nan
  KD_UNROLL for (int step = 16; step; step /= 2) {
    const T y = __shfl_xor_sync(~0u, x, step);
    x = x > y ? x : y;
  }
  return x;
}

// ---------------------------------------------------------------- numbers
KD_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KD_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KD_DEVICE float largest(float a, float b) { return fmaxf(a, b); }
KD_DEVICE float from_bf16(uint32_t low_half) { return __uint_as_float(low_half << 16); }
KD_DEVICE float from_f16(uint32_t low_half) {
  return __half2float(__ushort_as_half((unsigned short)low_half));
}
KD_DEVICE uint32_t to_bf16_pair(float low, float high) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
KD_DEVICE uint32_t to_f16_pair(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
// the larger of each half; the number where one is a nan
KD_DEVICE uint32_t largest_bf16_pair(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
KD_DEVICE uint32_t largest_f16_pair(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// ---------------------------------------------------------------- memory: 16 bytes, aligned to as many
struct Word4 { uint32_t x[4]; };
KD_DEVICE Word4 load16(const void *p) {
  const uint4 u = *(const uint4 *)p;
  return {{u.x, u.y, u.z, u.w}};
}
KD_DEVICE void store16(void *p, const Word4 &w) { *(uint4 *)p = make_uint4(w.x[0], w.x[1], w.x[2], w.x[3]); }
// written once, read by another kernel: first to leave the caches
KD_DEVICE void store_streaming(void *p, const Word4 &w) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.x[0]), "r"(w.x[1]), "r"(w.x[2]),
               "r"(w.x[3])
               : "memory");
}
KD_DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// A thread's own copies to shared memory: waited for by the thread that made them, in groups, the oldest
// first.
KD_DEVICE void copy_async(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
KD_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> KD_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---------------------------------------------------------------- blocks of a grid, through global memory
KD_DEVICE uint32_t next_ticket(uint32_t *counter) { return atomicAdd(counter, 1u); }
// what this warp has written before is seen by who sees the count
KD_DEVICE void announce(uint32_t *counter) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
KD_DEVICE void await(const uint32_t *counter, uint32_t count) {
  uint32_t x;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
  while (x < count);
}
KD_DEVICE double load_fresh(const double *p) { return __ldcg(p); }  // past the first-level cache

// ---------------------------------------------------------------- clusters and bulk copies: sm_90 and later
using Arrivals = uint64_t;  // an mbarrier, in shared memory
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
KD_DEVICE int cluster_rank() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
KD_DEVICE int64_t cluster() {
  uint32_t x;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(x));
  return x;
}
KD_DEVICE int64_t clusters() {
  uint32_t x;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(x));
  return x;
}
KD_DEVICE int cluster_blocks() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}
KD_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// the same place of another block's shared memory
template <class T> KD_DEVICE T *of_block(T *p, int rank) {
  uint64_t q;
  asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
  return (T *)q;
}
KD_DEVICE void arrivals_init(Arrivals *a) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(a))
      : "memory");
}
// the one arrival of a phase, and the bytes that complete it
KD_DEVICE void arrivals_expect(Arrivals *a, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes)
               : "memory");
}
KD_DEVICE void arrivals_wait(Arrivals *a, uint32_t phase) {
  uint32_t done;
  do
    asm volatile(
        "{.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(a)), "r"(phase)
        : "memory");
  while (!done);
}
// From global memory, multiples of 16 bytes at multiples of 16; first to leave the second-level cache, as
// nobody reads it again.
KD_DEVICE void copy_bulk(void *to, const void *from, uint32_t bytes, Arrivals *a) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(a)), "l"(policy)
      : "memory");
}
KD_DEVICE void before_bulk() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}  // what was stored here, before copy_bulk writes there
#endif

// ---------------------------------------------------------------- the host's side
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
#endif

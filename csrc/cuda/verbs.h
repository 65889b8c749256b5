// What the kernels ask of the hardware, each verb once. This is the device's; tests/simt/verbs_host.h has the
// same verbs for threads of the host, where a data race is one that a sanitizer can see.
#pragma once
#if !defined(__CUDACC__)
#include "verbs_host.h"  // found by the tests' include path
#else
#include <cstdint>
#include <cstring>
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
template <class T> KD_DEVICE T warp_largest(T x) {  // a nan gives way to the other lane's number
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

}  // namespace gpu

#include "launch.h"
#endif

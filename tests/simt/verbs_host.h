// The verbs of csrc/cuda/verbs.h on a host: shared memory is allocated to the byte (AddressSanitizer sees its
// end), and copies arrive no sooner than they are waited for. Each CUDA thread is a thread (threads.h), or,
// for speed, a fiber of one (fibers.h, with KD_FIBERS).
//
// A fault can be planted, to see that it is reported: a barrier left out, a copy of 16 bytes too many.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#define KD_KERNEL inline void
#define KD_DEVICE inline
#define KD_PARAM
#define KD_LAUNCH_BOUNDS(threads, blocks)
#define KD_UNROLL
#define KD_ROLLED

namespace gpu {

enum Fault { kNone, kRace, kOverrun };
inline Fault planted = kNone;

// threads of blocks that run at a time; ThreadSanitizer fails beyond 8,000
constexpr int kMostResident = 4096;

inline void require(bool true_, const char *what) {
  if (true_) return;
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

struct Here;
}  // namespace gpu

#if defined(KD_FIBERS)
#include "fibers.h"
#else
#include "threads.h"
#endif

namespace gpu {

struct Warp {
  Barrier barrier{32};
  double lanes[32][16];
};
struct Cluster {
  Barrier barrier;
  std::vector<char *> shared;
  explicit Cluster(int blocks, int threads) : barrier(blocks * threads), shared(blocks) {}
};
struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<char> flags;
  void *shared = nullptr;
  Block(int threads, int bytes) : barrier(threads), flags(threads) {
    for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<Warp>());
    require(!posix_memalign(&shared, 128, bytes ? bytes : 1), "no memory");
    std::memset(shared, 0xff, bytes);  // nans
  }
  ~Block() { std::free(shared); }
};

struct Copy {
  void *to;
  const void *from;
};
struct Here {
  int thread = 0, rank = 0, threads = 0, skipped = 0;
  int64_t block = 0, blocks = 0;
  Block *own = nullptr;
  Warp *warp = nullptr;
  Cluster *cluster = nullptr;
  std::vector<std::vector<Copy>> groups{1};  // of copies under way, the last one open
};
inline thread_local Here *self;  // of the thread that runs

inline int thread() { return self->thread; }
inline int64_t block() { return self->block; }
inline int64_t blocks() { return self->blocks; }
template <class T> T from_here(T x) { return x; }
inline char *shared() { return (char *)self->own->shared; }

inline void sync_block() {
  if (planted == kRace && self->skipped++ == 1) return;
  self->own->barrier.wait();
}
inline bool sync_block_any(bool x) {
  self->own->flags[self->thread] = x;
  self->own->barrier.wait();
  bool any = false;
  for (char flag : self->own->flags) any |= flag;
  self->own->barrier.wait();
  return any;
}
inline void sync_warp() { self->warp->barrier.wait(); }

// body(lanes) sees what every lane has put there.
template <class T, int N, class Body> void over_lanes(const T (&x)[N], Body body) {
  static_assert(N <= 16 && sizeof(T) <= 8, "");
  // exact for what is asked
  for (int i = 0; i < N; i++) self->warp->lanes[self->thread % 32][i] = double(x[i]);
  self->warp->barrier.wait();
  body(self->warp->lanes);
  self->warp->barrier.wait();
}
template <class T, int N> void warp_sum(T (&x)[N]) {
  T lanes[32];
  over_lanes(x, [&](const double (*all)[16]) {
    for (int i = 0; i < N; i++) {
      for (int l = 0; l < 32; l++) lanes[l] = T(all[l][i]);
      for (int step = 16; step; step /= 2) {  // in the order of the device
        T sums[32];
        for (int l = 0; l < 32; l++) sums[l] = lanes[l] + lanes[l ^ step];
        std::memcpy(lanes, sums, sizeof sums);
      }
      x[i] = lanes[self->thread % 32];
    }
  });
}
template <class T> T warp_largest(T x) {
  const T one[1]{x};
  over_lanes(one, [&](const double (*all)[16]) {
    for (int l = 0; l < 32; l++) {
      const T y = T(all[l][0]);
      x = x > y ? x : y;
    }
  });
  return x;
}
inline int warp_first(bool x) {
  const int one[1]{x};
  int first = -1;
  over_lanes(one, [&](const double (*all)[16]) {
    for (int l = 31; l >= 0; l--)
      if (all[l][0] != 0) first = l;
  });
  return first;
}
inline bool warp_any(bool x) { return warp_first(x) >= 0; }

// ---------------------------------------------------------------- numbers
// As inexact as the hardware's: off by a unit in the last place either way, but at integers.
inline float exp2(float x) {
  float y = x < -126 ? 0 : std::exp2f(x);
  if (!(y > 0 && y < INFINITY) || x == std::floor(x)) return y;
  uint32_t u, v;
  std::memcpy(&u, &x, 4);
  std::memcpy(&v, &y, 4);
  v += (u * 2654435761u >> 30) % 3 - 1;
  std::memcpy(&y, &v, 4);
  return y;
}
inline float reciprocal(float x) { return 1 / x; }
inline float largest(float a, float b) { return std::fmax(a, b); }
inline float from_bf16(uint32_t u) {
  u <<= 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float from_f16(uint32_t u) {
  _Float16 h;
  const uint16_t s = uint16_t(u);
  std::memcpy(&h, &s, 2);
  return float(h);
}
inline uint32_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline uint32_t to_f16(float x) {
  const _Float16 h = _Float16(x);
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
}
inline uint32_t to_bf16_pair(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline uint32_t to_f16_pair(float low, float high) { return to_f16(low) | to_f16(high) << 16; }
template <class From> uint32_t largest_pair(uint32_t a, uint32_t b, From from) {
  const auto half = [&](uint32_t x, uint32_t y) {
    return !(from(y) > from(x)) && from(x) == from(x) ? x : y;
  };
  return half(a & 0xffff, b & 0xffff) | half(a >> 16, b >> 16) << 16;
}
inline uint32_t largest_bf16_pair(uint32_t a, uint32_t b) { return largest_pair(a, b, from_bf16); }
inline uint32_t largest_f16_pair(uint32_t a, uint32_t b) { return largest_pair(a, b, from_f16); }

// ---------------------------------------------------------------- memory
struct Word4 { uint32_t x[4]; };
inline void require_aligned(const void *p) {
  require((uintptr_t)p % 16 == 0, "an access of 16 bytes that is not aligned");
}
inline Word4 load16(const void *p) {
  require_aligned(p);
  Word4 w;
  std::memcpy(&w, p, 16);
  return w;
}
inline void store16(void *p, const Word4 &w) {
  require_aligned(p);
  std::memcpy(p, &w, 16);
}
inline void store_streaming(void *p, const Word4 &w) { store16(p, w); }

inline void copy_async(void *to, const void *from) {
  require_aligned(to);
  require_aligned(from);
  self->groups.back().push_back({to, from});
}
inline void copy_commit() { self->groups.emplace_back(); }
template <int kPending> void copy_wait() {
  while (int(self->groups.size()) > kPending + 1) {
    for (const Copy &c : self->groups.front()) std::memcpy(c.to, c.from, 16);
    self->groups.erase(self->groups.begin());
  }
}

inline uint32_t next_ticket(uint32_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }
inline void announce(uint32_t *counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }
inline void await(const uint32_t *counter, uint32_t count) {
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < count) let_others();
}
inline double load_fresh(const double *p) { return *p; }

// ---------------------------------------------------------------- clusters and bulk copies
struct alignas(8) Arrivals {
  std::atomic<uint32_t> phase;
  std::atomic<int32_t> bytes;
};

inline int cluster_rank() { return self->rank; }
inline int cluster_blocks() { return int(self->cluster->shared.size()); }
inline int64_t cluster() { return self->block / cluster_blocks(); }
inline int64_t clusters() { return self->blocks / cluster_blocks(); }
inline void sync_cluster() { self->cluster->barrier.wait(); }
template <class T> T *of_block(T *p, int rank) {
  return (T *)(self->cluster->shared[rank] + ((char *)p - shared()));
}
inline void arrivals_init(Arrivals *a) { new (a) Arrivals{}; }
inline void arrivals_expect(Arrivals *a, uint32_t bytes) {
  require(a->bytes == 0, "a phase that has not ended is begun again");
  if (bytes)
    a->bytes = int32_t(bytes);
  else
    a->phase.fetch_add(1, std::memory_order_release);
}
inline void arrivals_wait(Arrivals *a, uint32_t phase) {
  while (a->phase.load(std::memory_order_acquire) % 2 == phase) let_others();
}
inline void copy_bulk(void *to, const void *from, uint32_t bytes, Arrivals *a) {
  require_aligned(to);
  require_aligned(from);
  require(bytes % 16 == 0, "a bulk copy of bytes that 16 does not divide");
  std::memcpy(to, from, bytes + (planted == kOverrun ? 16 : 0));
  if (a->bytes.fetch_sub(int32_t(bytes)) == int32_t(bytes)) a->phase.fetch_add(1, std::memory_order_release);
}
inline void before_bulk() {}

// ---------------------------------------------------------------- the host's side
struct Shape {
  int64_t blocks;
  int threads, cluster, shared;
};
struct Device {
  int capability = 90, processors = 8, shared_per_block = 227 << 10, shared_per_processor = 228 << 10,
      clusters = 2;
};
inline Device device;  // what a test says it is

template <class Kernel> int allow(Kernel *, bool) { return 0; }
template <class Kernel> int most_clusters(Kernel *, const Shape &, int *most) {
  *most = device.clusters;
  return 0;
}
inline int zero(void *p, int64_t bytes, void *) {
  std::memset(p, 0, bytes);
  return 0;
}

template <class... Args>
int launch(void (*kernel)(Args...), const Shape &s, void *,
           const typename std::remove_const<Args>::type &...args) {
  if (s.shared > device.shared_per_block) return 1;
  const int at_a_time = kMostResident / s.threads / s.cluster * s.cluster;
  for (int64_t first = 0; first < s.blocks; first += at_a_time) {
    const int n = int(s.blocks - first < at_a_time ? s.blocks - first : at_a_time);
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Cluster>> clusters;
    for (int i = 0; i < n; i++) {
      blocks.push_back(std::make_unique<Block>(s.threads, s.shared));
      if (i % s.cluster == 0) clusters.push_back(std::make_unique<Cluster>(s.cluster, s.threads));
      clusters.back()->shared[i % s.cluster] = (char *)blocks[i]->shared;
    }
    std::vector<Here> those(n * s.threads);
    for (int i = 0; i < n; i++)
      for (int t = 0; t < s.threads; t++) {
        Here &h = those[i * s.threads + t];
        h.thread = t;
        h.threads = s.threads;
        h.rank = i % s.cluster;
        h.block = first + i;
        h.blocks = s.blocks;
        h.own = blocks[i].get();
        h.warp = h.own->warps[t / 32].get();
        h.cluster = clusters[i / s.cluster].get();
      }
    side_by_side(n * s.threads, [&](int i) { self = &those[i]; }, [&] { kernel(args...); });
  }
  return 0;
}
template <class Figures> int figures(int, Figures &f) {
  f.capability = device.capability;
  f.processors = device.processors;
  f.shared_per_block = device.shared_per_block;
  f.shared_per_processor = device.shared_per_processor;
  return 0;
}
struct OnDevice {
  explicit OnDevice(int) {}
};
template <class Kernel> const char *unavailable(Kernel *, int) { return nullptr; }
inline const char *error_text(int) { return "the launch was refused"; }

}  // namespace gpu

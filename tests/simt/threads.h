// A CUDA thread as a thread: what the sanitizers watch. Barriers are pthread's, through which ThreadSanitizer
// sees.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <thread>
#include <vector>

namespace gpu {

class Barrier {
 public:
  explicit Barrier(int n) { pthread_barrier_init(&barrier_, nullptr, n); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier &) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};
inline void let_others() { sched_yield(); }

// body by n threads at once, each of which has called enter with its number.
template <class Enter, class Body> void side_by_side(int n, Enter enter, Body body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < n; i++)
    threads.emplace_back([&, i] {
      enter(i);
      body();
    });
  for (auto &t : threads) t.join();
}

}  // namespace gpu

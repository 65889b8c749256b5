// A CUDA thread as a fiber: each runs until it has to wait, then the next one does. A barrier of hundreds of
// threads costs a jump for each instead of a system call.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace gpu {

class Fibers {
 public:
  void run(int n, std::function<void(int)> enter, std::function<void()> body) {
    enter_ = std::move(enter);
    body_ = std::move(body);
    // their stacks serve every launch
    while (int(all_.size()) < n) all_.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < n; i++) all_[i]->state = kNew;
    for (running_ = n; running_ > 0;)
      for (now_ = 0; now_ < n; now_++)
        if (all_[now_]->state != kDone) resume();
  }
  void next() {
    if (!_setjmp(all_[now_]->at)) _longjmp(home_, 1);
  }

 private:
  enum State { kNew, kWaits, kDone };
  static constexpr size_t kStack = 256 << 10;
  struct Fiber {
    State state = kNew;
    jmp_buf at;
    std::unique_ptr<char[]> stack{new char[kStack]};  // not touched before it is used
  };

  void resume() {
    if (_setjmp(home_)) return;
    enter_(now_);
    Fiber &fiber = *all_[now_];
    if (fiber.state == kWaits) _longjmp(fiber.at, 1);
    fiber.state = kWaits;
    ucontext_t begin;
    getcontext(&begin);
    begin.uc_stack.ss_sp = fiber.stack.get();
    begin.uc_stack.ss_size = kStack;
    begin.uc_link = nullptr;
    makecontext(&begin, main, 0);
    setcontext(&begin);
  }
  static void main();

  std::function<void(int)> enter_;
  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> all_;
  jmp_buf home_;
  int now_ = 0, running_ = 0;
};
inline thread_local Fibers fibers;

inline void Fibers::main() {
  fibers.body_();
  fibers.all_[fibers.now_]->state = kDone;
  fibers.running_--;
  _longjmp(fibers.home_, 1);
}

class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  Barrier(const Barrier &) = delete;
  void wait() {
    const int64_t round = round_;
    if (++waiting_ == n_) {
      waiting_ = 0;
      round_++;
    }
    while (round_ == round) fibers.next();
  }

 private:
  const int n_;
  int waiting_ = 0;
  int64_t round_ = 0;
};
inline void let_others() { fibers.next(); }

template <class Enter, class Body> void side_by_side(int n, Enter enter, Body body) {
  fibers.run(n, enter, body);
}

}  // namespace gpu

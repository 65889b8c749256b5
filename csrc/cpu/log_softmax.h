// log softmax(x / T) over rows, and its gradient.
#pragma once
#include "block.h"

namespace kd {
namespace KD_LEVEL {
namespace {

// The largest logit of a row, the sum of the others' e^{(x - top)/T}, and the sum of the upstream gradient.
struct SoftmaxSums {
  double top = -INFINITY, rest = 0, upstream = 0;
  bool broken = false;
};

template <class Real> class SoftmaxRow {
 public:
  using F = typename Vec<Real>::F;
  using D = typename Vec<Real>::D;
  static constexpr int W = Vec<Real>::W;
  static constexpr int64_t N = kBlock<Real>;

  SoftmaxRow(const kd_log_softmax_call &c, int64_t row)
      : c_(c),
        k_(1 / c.temperature),
        blocks_((c.vocab + N - 1) / N),
        x_((const char *)c.logits + row * c.logits_stride * element_size(c.dtype)),
        upstream_(c.upstream ? (const char *)c.upstream + row * c.upstream_stride * element_size(c.dtype)
                             : nullptr),
        out_((char *)c.out + row * c.out_stride * element_size(c.dtype)) {}

  void run(bool streaming) {
    SoftmaxSums s;
    for (int64_t i = 0; i < blocks_; i++) {
      add_block(i, s);
      if (upstream_) add_upstream(i, s);
    }
    s.broken |= !std::isfinite(s.top);
    for (int64_t i = 0; i < blocks_; i++) emit(i, s, streaming);
  }

 private:
  // Block i of a row to `to`, filled up to whole vectors: how many classes that makes.
  int64_t fetch(const char *row, int64_t i, Real *to, Real fill) const {
    const int64_t n = smaller(N, c_.vocab - i * N), padded = round_up(n, W);
    load_row(row, c_.dtype, i * N, n, to);
    for (int64_t j = n; j < padded; j++) to[j] = fill;
    return padded;
  }
  // (v - top) / T; at T = inf every class that is not masked has the same logit.
  F scaled(F v, Real top) const {
    return k_ > 0 ? (v - top) * Real(k_) : select(v == Real(-INFINITY), v, v - v);
  }

  void add_block(int64_t i, SoftmaxSums &s) {
    const int64_t n = fetch(x_, i, logits_, Real(-INFINITY));
    const double top = largest<Real>(logits_, n);
    const bool higher = top > s.top;
    if (higher) {
      s.rest = s.top > -INFINITY ? (s.rest + 1) * std::exp(k_ > 0 ? (s.top - top) * k_ : 0) : 0;
      s.top = top;
    }
    D others{}, ties{};
    typename Vec<Real>::I nan{};
    for (int64_t j = 0; j < n; j += W) {
      const F v = load<F>(logits_ + j), a = scaled(v, Real(s.top)) * Real(kLog2e);
      const F e = exp2_of_product(a, Real(1), Exp2<Real>::kFloor);
      nan |= v != v;
      others += __builtin_convertvector(select(a == Real(0), F{}, e), D);
      ties += __builtin_convertvector(select(a == Real(0), splat<F>(1), F{}), D);
    }
    for (int j = 0; j < W; j++) s.broken |= nan[j] != 0;
    s.rest += sum_of<Real>(others) + (sum_of<Real>(ties) - (higher ? 1 : 0));
  }

  void add_upstream(int64_t i, SoftmaxSums &s) {
    const int64_t n = fetch(upstream_, i, up_, Real(0));
    D sum{};
    for (int64_t j = 0; j < n; j += W) sum += __builtin_convertvector(load<F>(up_ + j), D);
    s.upstream += sum_of<Real>(sum);
  }

  void emit(int64_t i, const SoftmaxSums &s, bool streaming) {
    const Real log_total = s.broken ? Real(NAN) : Real(std::log1p(s.rest)),
               inverse = Real(s.upstream / (1 + s.rest));
    fetch(x_, i, logits_, Real(-INFINITY));
    if (upstream_) fetch(upstream_, i, up_, Real(0));
    store_row(out_, c_.dtype, i * N, smaller(N, c_.vocab - i * N), streaming, Real(0), [&](int64_t j) {
      const F a = scaled(load<F>(logits_ + j), Real(s.top));
      if (!upstream_) return F(a - log_total);
      const F e = exp2_of_product(F(a * Real(kLog2e)), Real(1), Exp2<Real>::kFloor);
      return F((load<F>(up_ + j) - e * inverse + log_total * Real(0)) * Real(k_));
    });
  }

  alignas(64) Real logits_[kSlot<Real>], up_[kSlot<Real>];
  const kd_log_softmax_call &c_;
  const double k_;
  const int64_t blocks_;
  const char *const x_, *const upstream_;
  char *const out_;
};

template <class Real> void log_softmax_rows(const kd_log_softmax_call &c) {
  const bool streaming = c.rows * c.vocab * element_size(c.dtype) > (int64_t(8) << 20);
#pragma omp parallel for schedule(static) \
    num_threads(c.threads) if (c.rows * c.vocab >= 32768 && c.threads > 1)
  for (int64_t row = 0; row < c.rows; row++) {
    SoftmaxRow<Real>(c, row).run(streaming);
    if (streaming) stream_fence();
  }
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

// The rows that the step of row.h cannot take, in fp64: differences beyond the range of a float exponential (low temperatures, large
// orders), divergences that are +inf, rows with nan, and orders 0 and inf. Slower, rare, and right for every input.
//
// Textbook order: maxima; sums at T; the terms of F; then the gradient, block by block, from what the first three left. A block
// comes as two rows of doubles padded with -inf, and a class masked in both rows counts for nothing, so there are no tails.
#pragma once
#include "row.h"

namespace kd {
namespace KD_LEVEL {

KD_HD VD abs_of(VD x) { return from_bits(bits(x) & Exp2<double>::kAbs); }
KD_HD double sum_of(VD x) { double s = 0; for (int i = 0; i < Vec<double>::W; i++) s += x[i]; return s; }
KD_HD double max_of(VD x) { double s = x[0]; for (int i = 1; i < Vec<double>::W; i++) s = x[i] > s ? x[i] : s; return s; }
KD_HD bool any(VL x) { int64_t s = 0; for (int i = 0; i < Vec<double>::W; i++) s |= x[i]; return s != 0; }
KD_HD VD exp2_flushed(VD x) { return exp2_of_product(x, 1., Exp2<double>::kFloor); }
// expm1_psi for arguments in natural units, 0 outside |x| < 1/2 where it is not used
KD_HD ExpM1<VD> near_zero(VD x, VL near) { return expm1_psi(select(near, x, VD{}) * kLog2e); }

class Careful {
 public:
  explicit Careful(const Plan &p) : plan_(p), k_(p.moments ? 1 : p.k), b_(1 - p.order) {}

  // blocks(f) calls f(z, v, n) for each block of the row, n a multiple of the vector width.
  template <class Blocks> double measure(Blocks blocks) {
    blocks([&](const double *z, const double *v, int64_t n) { each(z, v, n, [&](VD z, VD v) {
      mz = larger(z, mz); mv = larger(v, mv);
      nan |= (z != z) | (v != v);
    }); });
    top_z_ = max_of(mz); top_v_ = max_of(mv);
    broken_ = any(nan) || !std::isfinite(top_z_) || !std::isfinite(top_v_);
    if (broken_) return NAN;

    blocks([&](const double *z, const double *v, int64_t n) { each(z, v, n, [&](VD z, VD v) { add_sums(z, v); }); });
    if (plan_.moments) return measure_moments(blocks);
    const double sz = sum_of(sz_), sv = sum_of(sv_), sd = sum_of(sd_);
    inv_z_ = 1 / sz; inv_v_ = 1 / sv;
    shift_ = std::fabs(sd) < .5 * sv ? std::log1p(sd / sv) : std::log(sz) - std::log(sv);
    log_v_ = std::log(sv);
    const bool lone_p = any(lone_p_);
    if (plan_.order == 0) {
      const double out = sum_of(out_), in = sum_of(in_);
      ratio_ = in > 0 ? out / in : 0;
      return in > 0 ? std::log1p(ratio_) : INFINITY;
    }
    if (std::isinf(plan_.order)) {
      least_ = -max_of(-least_v_);
      // q over the set where d is smallest, relative to its own largest: all of it may be far below the row's
      VD top = splat<VD>(-INFINITY), set{};
      blocks([&](const double *z, const double *v, int64_t n) { each(z, v, n, [&](VD z, VD v) { top = select(z - v == least_, larger(z, top), top); }); });
      top_set_ = max_of(top);
      blocks([&](const double *z, const double *v, int64_t n) { each(z, v, n, [&](VD z, VD v) { set += select(z - v == least_, exp_set(z), VD{}); }); });
      const double chosen = sum_of(set), rest = sz - chosen * std::exp((top_set_ - top_z_) * k_);
      in_set_ = lone_p ? 0 : rest / chosen * inv_z_;
      return lone_p ? INFINITY : larger(shift_ - (least_ - (top_z_ - top_v_)) * k_, 0.);
    }
    top_u_ = max_of(mu_);
    infinite_ = plan_.order >= 1 ? lone_p : !std::isfinite(top_u_);

    blocks([&](const double *z, const double *v, int64_t n) { each(z, v, n, [&](VD z, VD v) { su_ += tilted(z, v); }); });
    const double su = plan_.tilted && !infinite_ ? sum_of(su_) : 1;
    inv_u_ = 1 / su;
    log_r_ = plan_.tilted ? top_u_ * kLn2 + std::log(su) - log_v_ - b_ * shift_ : 0;
    if (infinite_) { log_r_ = 0; return INFINITY; }
    const double R = std::exp(log_r_);
    blocks([&](const double *z, const double *v, int64_t n) { each(z, v, n, [&](VD z, VD v) { add_terms(z, v, R); }); });
    const double F = larger(sum_of(f_), 0.);
    if (!plan_.tilted) return F + (plan_.entropy ? sum_of(entropy_) : 0);
    if (near_one(R)) log_r_ = std::log1p(-b_ * (1 - b_) * F);
    return log_r_ / -b_;
  }

  // T dD/dz of a block: q - w.
  void gradient(const double *z, const double *v, int64_t n, double *g) const {
    constexpr int W = Vec<double>::W;
    for (int64_t i = 0; i < n; i += W) store(g + i, broken_ ? splat<VD>(NAN) : gradient(load<VD>(z + i), load<VD>(v + i)));
  }

 private:
  template <class Body> static void each(const double *z, const double *v, int64_t n, Body body) {
    for (int64_t i = 0; i < n; i += Vec<double>::W) body(load<VD>(z + i), load<VD>(v + i));
  }
  static VL masked(VD x) { return x == -INFINITY; }
  VD exp_z(VD z) const { return exp2_flushed((z - top_z_) * plan_.c); }
  VD exp_set(VD z) const { return exp2_flushed((z - top_set_) * plan_.c); }
  VD exp_v(VD v) const { return exp2_flushed((v - top_v_) * plan_.c); }
  // ((z - v) - (top_z - top_v)) / T in base 2, 0 where a class is masked
  VD diff(VD z, VD v) const { return select(masked(z) | masked(v), VD{}, (z - v) - (top_z_ - top_v_)) * plan_.c; }
  VD log_ratio(VD z, VD v) const { return diff(z, v) * kLn2 - shift_; }
  // base-2 exponent of p^a q^(1-a), up to the constants of the row
  VD exponent(VD z, VD v) const {
    const VL dead = masked(v) | masked(z);                            // orders above 1 with z masked are +inf anyway
    return select(dead, splat<VD>(-INFINITY), (v - top_v_) * plan_.c + b_ * diff(z, v));
  }
  VD tilted(VD z, VD v) const { return plan_.tilted ? exp2_flushed(exponent(z, v) - top_u_) : exp_v(v); }

  void add_sums(VD z, VD v) {
    const VL no_z = masked(z), no_v = masked(v);
    lone_p_ |= no_z & ~no_v; lone_q_ |= no_v & ~no_z;
    if (plan_.moments) {
      const VD both = select(no_z | no_v, VD{}, splat<VD>(1));
      sv_ += both; sd_ += select(no_z | no_v, VD{}, z - v);
      return;
    }
    const VD ez = exp_z(z), ev = exp_v(v), y = diff(z, v);
    const VL near = (abs_of(y) < .5) & ~(no_z | no_v);
    sz_ += ez; sv_ += ev;
    sd_ += select(near, ev * expm1_psi(select(near, y, VD{})).m1, ez - ev);
    out_ += select(no_v, ez, VD{}); in_ += select(no_v, VD{}, ez);
    const VD gap = select(no_v, splat<VD>(INFINITY), z - v);
    least_v_ = select(gap < least_v_, gap, least_v_);
    if (plan_.tilted && plan_.order > 0) mu_ = larger(exponent(z, v), mu_);
  }

  void add_terms(VD z, VD v, double R) {
    const VL no_z = masked(z), no_v = masked(v);
    const VD p = exp_v(v) * inv_v_, q = exp_z(z) * inv_z_, d = log_ratio(z, v);
    const VL near = abs_of(d) * larger(1., std::fabs(b_)) < .5;
    const VD series = near_zero(d, near).psi;
    VD term;
    if (plan_.tilted) {
      const VL close = abs_of(b_ * d) < .5;
      const ExpM1<VD> m = near_zero(b_ * d, close);
      const VD powers = select(close, p * m.m1, tilted(z, v) * inv_u_ * R - p);
      term = select(near, p * (series - m.psi / b_), (q - p) - powers / b_);
      term = select(no_v, q, select(no_z, p * (1 / b_ - 1), term)) / (1 - b_);
    } else {
      term = select(near, p * series, (q - p) - p * d);
      term = select(no_v, q, term);
    }
    f_ += select(no_z & no_v, VD{}, term);
    entropy_ += select(p > 0., p * (log_v_ - (v - top_v_) * k_), VD{});
  }

  VD gradient(VD z, VD v) const {
    const VL no_z = masked(z), no_v = masked(v);
    if (plan_.moments) return select(no_z | no_v, VD{}, ((z - v) - shift_) * inv_v_ * plan_.factor);
    const VD q = exp_z(z) * inv_z_;
    if (plan_.order == 0) return select(no_v, q, -q * ratio_);
    if (std::isinf(plan_.order)) return select(no_z, VD{}, select(z - v == least_, -exp_set(z) * in_set_, q));
    const VD p = exp_v(v) * inv_v_, d = log_ratio(z, v);
    const bool plain = !plan_.tilted || infinite_;
    const VD x = plain ? VD{} : b_ * d - log_r_, w = plain ? p : tilted(z, v) * inv_u_;
    const VL near = (abs_of(d) < .5) & (abs_of(x) < .5) & ~(no_z | no_v);
    const VD g = select(near, p * (near_zero(d, near).m1 - near_zero(x, near).m1), q - w);
    return select(no_z, VD{}, g);                                     // a masked class of the student is not moved
  }

  // T = inf: the variance of z - v over the classes that both have
  template <class Blocks> double measure_moments(Blocks blocks) {
    const double n = sum_of(sv_);
    inv_v_ = 1 / n;
    shift_ = plan_.centered ? sum_of(sd_) * inv_v_ : 0;
    blocks([&](const double *z, const double *v, int64_t n) { each(z, v, n, [&](VD z, VD v) {
      const VD x = select(masked(z) | masked(v), VD{}, (z - v) - shift_);
      f_ += x * x;
    }); });
    if (plan_.factor == 0) return any(lone_q_) ? INFINITY : 0;        // Renyi(0) asks only whose support it is
    if (any(lone_p_) || any(lone_q_)) return INFINITY;
    return plan_.factor * sum_of(f_) * inv_v_ / 2;
  }

  const Plan &plan_;
  const double k_, b_;
  VD mz = splat<VD>(-INFINITY), mv = splat<VD>(-INFINITY), mu_ = splat<VD>(-INFINITY), least_v_ = splat<VD>(INFINITY);
  VL nan{}, lone_p_{}, lone_q_{};
  VD sz_{}, sv_{}, sd_{}, su_{}, out_{}, in_{}, f_{}, entropy_{};
  double top_z_ = 0, top_v_ = 0, top_u_ = 0, inv_z_ = 0, inv_v_ = 0, inv_u_ = 1, shift_ = 0, log_v_ = 0, log_r_ = 0, ratio_ = 0, least_ = 0, top_set_ = 0, in_set_ = 0;
  bool broken_ = false, infinite_ = false;
};

}  // namespace KD_LEVEL
}  // namespace kd

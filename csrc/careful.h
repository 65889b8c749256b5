// The rows that the step of row.h cannot take, in fp64: differences beyond the range of a float exponential
// (low temperatures, large orders), divergences that are +inf, rows with nan, and orders 0 and inf. Slower,
// rare, and right for every input.
//
// Textbook order: maxima; sums at T; the terms of F; then the gradient, class by class, from what the first
// three left. F is a vector of doubles padded with -inf (a class masked in both rows counts for nothing, so
// there are no tails) or one double of a GPU's thread; a Crew gives sums and maxima over all lanes.
#pragma once
#include "row.h"

namespace kd {
namespace KD_LEVEL {

template <class F> KD_HD F abs_of(F x) { return from_bits(bits(x) & Exp2<double>::kAbs); }
template <class F> KD_HD F exp2_flushed(F x) { return exp2_of_product(x, 1., Exp2<double>::kFloor); }
// expm1_psi for arguments in natural units, 0 outside |x| < 1/2 where it is not used
template <class F, class Mask> KD_HD ExpM1<F> near_zero(F x, Mask near) {
  return expm1_psi(select(near, x, F{}) * kLog2e);
}

template <class F, class Crew> class Careful {
 public:
  using Int = typename Element<F>::Int;
  KD_HD Careful(const Plan &p, const Crew &crew)
      : plan_(p), crew_(crew), k_(p.k), b_(1 - p.order), sign_(p.reverse ? -1 : 1) {}

  // classes(f) calls f(z, v) for every class of the row.
  template <class Classes> KD_HD double measure(Classes classes) {
    classes([&](F z, F v) {
      mz = larger(z, mz);
      mv = larger(v, mv);
      nan_z_ |= z != z;
      nan_v_ |= v != v;
    });
    top_z_ = crew_.largest(mz);
    top_v_ = crew_.largest(mv);
    broken_student_ = crew_.any(nan_z_) || !std::isfinite(top_z_);
    broken_ = crew_.any(nan_v_) || !std::isfinite(top_v_) || broken_student_;
    if (broken_) return NAN;
    apart_ = top_z_ - top_v_;
    if (std::fabs(apart_) > kFarthest) {
      base_z_ = top_z_;
      base_v_ = top_v_;
      apart_ = 0;
    }

    classes([&](F z, F v) { add_sums(z, v); });
    const double sz = crew_.sum(sz_), sv = crew_.sum(sv_), sd = crew_.sum(sd_);
    inv_z_ = 1 / sz;
    inv_v_ = 1 / sv;
    shift_ = std::fabs(sd) < .5 * sv ? log1p_of(sd / sv) : log_of(sz) - log_of(sv);
    log_v_ = log_of(sv);
    const bool lone_p = crew_.any(lone_p_), lone_q = crew_.any(lone_q_);
    if (plan_.support) {
      const double out = crew_.sum(out_), in = crew_.sum(in_);
      ratio_ = in > 0 ? out / in : 0;
      return in > 0 ? log1p_of(ratio_) : INFINITY;
    }
    if (plan_.extreme) {
      const bool lone = plan_.reverse ? lone_q : lone_p;
      least_ = -crew_.largest(-least_v_);
      // q over the set where d is smallest (reversed: largest), relative to its own largest: all of it may be
      // far below the row's
      F top = splat<F>(-INFINITY), set{};
      classes([&](F z, F v) { top = select(chosen(z, v), larger(z, top), top); });
      top_set_ = crew_.largest(top);
      classes([&](F z, F v) { set += select(chosen(z, v), exp_set(z), F{}); });
      const double inside = crew_.sum(set), rest = sz - inside * exp_of((top_set_ - top_z_) * k_);
      in_set_ = lone ? 0 : rest / inside * inv_z_;
      return lone ? INFINITY : larger(sign_ * shift_ - (least_ - sign_ * apart_) * k_, 0.);
    }
    if (plan_.mixed) {
      infinite_ = !(plan_.mixture.other_alone_term < INFINITY) && lone_q;
      if (infinite_) return INFINITY;
      F terms{}, moved{};
      classes([&](F z, F v) {
        const Kept<F> x = mixed(z, v);
        terms += x.e;
        moved += x.em;
      });
      moved_ = crew_.sum(moved);
      return larger(crew_.sum(terms), 0.);
    }
    top_u_ = crew_.largest(mu_);
    const bool disjoint = !std::isfinite(top_u_);
    if (plan_.alpha && plan_.order > 0 && plan_.order < 1 && disjoint) {
      gain_ = 0;
      infinite_ = true;
      return plan_.factor / (plan_.order * b_);
    }
    infinite_ = plan_.order >= 1 ? lone_p : plan_.order < 0 ? lone_q : disjoint;

    classes([&](F z, F v) { su_ += tilted(z, v); });
    const double su = plan_.tilted && !infinite_ ? crew_.sum(su_) : 1;
    inv_u_ = 1 / su;
    log_r_ = plan_.tilted ? top_u_ * kLn2 + log_of(su) - log_v_ - b_ * shift_ : 0;
    if (infinite_) {
      log_r_ = 0;
      gain_ = plan_.alpha && plan_.tilted ? NAN : plan_.factor;
      return INFINITY;
    }
    const double R = exp_of(log_r_);
    classes([&](F z, F v) { add_terms(z, v, R); });
    const double terms = larger(crew_.sum(f_), 0.);
    if (!plan_.tilted) {
      gain_ = plan_.factor;
      return plan_.factor * terms;
    }
    if (near_one(R)) log_r_ = log1p_of(-b_ * plan_.order * terms);
    gain_ = plan_.factor * (plan_.alpha ? exp_of(log_r_) / plan_.order : 1);
    if (plan_.alpha) return plan_.factor * (near_one(R) ? terms : expm1_of(log_r_) / (-b_ * plan_.order));
    return top_u_ < kMost ? plan_.factor * log_r_ / -b_ : INFINITY;
  }

  // After measure: whether the student's row has nan or +inf, or no class, which breaks its hard term as
  // well.
  KD_HD bool broken_student() const { return broken_student_; }

  // After measure: log-sum-exps of z/T and v/T, and the entropies of their softmaxes.
  template <class Classes> KD_HD Shapes shapes(Classes classes) const {
    if (broken_) return {NAN, NAN, NAN, NAN};
    F sz{}, sv{}, log_z{}, log_v{};
    classes([&](F z, F v) {
      const Int no_z = masked(z), no_v = masked(v);
      const F a = select(no_z, F{}, (z - top_z_) * k_), b = select(no_v, F{}, (v - top_v_) * k_);
      const F ez = select(no_z, F{}, exp2_flushed(a * kLog2e)),
              ev = select(no_v, F{}, exp2_flushed(b * kLog2e));
      sz += ez;
      sv += ev;
      log_z += select(ez > 0., ez * a, F{});
      log_v += select(ev > 0., ev * b, F{});  // a and b may be -inf
    });
    const double z = crew_.sum(sz), v = crew_.sum(sv), lse_z = log_of(z), lse_v = log_of(v);
    return {lse_z + k_ * top_z_, lse_v + k_ * top_v_, lse_z - crew_.sum(log_z) / z,
            lse_v - crew_.sum(log_v) / v};
  }

  // T dD/dz of a class: q - w.
  KD_HD F gradient(F z, F v) const { return broken_ ? splat<F>(NAN) : moved(z, v); }

 private:
  static constexpr double kMost = 1e308;  // the largest exponent that is told from others

  static KD_HD Int masked(F x) { return x == -INFINITY; }
  KD_HD F exp_z(F z) const { return exp2_flushed((z - top_z_) * plan_.c); }
  KD_HD F exp_set(F z) const { return exp2_flushed((z - top_set_) * plan_.c); }
  KD_HD F exp_v(F v) const { return exp2_flushed((v - top_v_) * plan_.c); }
  // z - v. Where the rows lie far apart, one of them being a mask of 1e30 or more as a whole, a difference
  // keeps no digit of the other: each logit is then measured from its own row's largest.
  KD_HD F gap(F z, F v) const { return (z - base_z_) - (v - base_v_); }
  // z - v less what it is between the largest logits, 0 where a class is masked. A logit may be the least
  // finite number (a mask of many models): it is scaled last, as a sum of scaled numbers could be inf - inf.
  KD_HD F diff(F z, F v) const { return select(masked(z) | masked(v), F{}, gap(z, v) - apart_); }
  KD_HD F log_ratio(F z, F v) const { return diff(z, v) * k_ - shift_; }
  // base-2 exponent of p^a q^(1-a), up to the constants of the row; not +inf, so that classes compare
  KD_HD F exponent(F z, F v) const {
    // orders above 1 with z masked are +inf anyway
    const Int dead = masked(v) | masked(z);
    const F all = ((v - top_v_) + b_ * diff(z, v)) * plan_.c;
    return select(dead, splat<F>(-INFINITY), select(all > kMost, splat<F>(kMost), all));
  }
  // the classes that w is q restricted to, order inf
  KD_HD Int chosen(F z, F v) const { return (gap(z, v) * sign_ == least_) & ~(masked(z) | masked(v)); }
  KD_HD F tilted(F z, F v) const { return plan_.tilted ? exp2_flushed(exponent(z, v) - top_u_) : exp_v(v); }

  KD_HD void add_sums(F z, F v) {
    const Int no_z = masked(z), no_v = masked(v);
    lone_p_ |= no_z & ~no_v;
    lone_q_ |= no_v & ~no_z;
    const F ez = exp_z(z), ev = exp_v(v), y = diff(z, v) * plan_.c;
    const Int near = (abs_of(y) < .5) & ~(no_z | no_v);
    sz_ += ez;
    sv_ += ev;
    sd_ += select(near, ev * expm1_psi(select(near, y, F{})).m1, ez - ev);
    const F own = plan_.reverse ? ev : ez;
    const Int outside = plan_.reverse ? no_z : no_v;
    out_ += select(outside, own, F{});
    in_ += select(outside, F{}, own);
    const F least = select(outside, splat<F>(INFINITY), gap(z, v) * sign_);
    least_v_ = select(least < least_v_, least, least_v_);
    if (plan_.tilted) mu_ = larger(exponent(z, v), mu_);
  }

  KD_HD void add_terms(F z, F v, double R) {
    const Int no_z = masked(z), no_v = masked(v);
    const F p = exp_v(v) * inv_v_, q = exp_z(z) * inv_z_, d = log_ratio(z, v);
    const double tilt = plan_.student_base ? plan_.order : b_;
    const Int near = abs_of(d) * larger(1., std::fabs(tilt)) < .5;
    F term;
    if (plan_.tilted) {  // from the side of the smaller tilt
      const bool flip = plan_.student_base;
      const F base = flip ? q : p, other = flip ? p : q, x = flip ? -d : d;
      const Int close = abs_of(tilt * x) < .5;
      const ExpM1<F> m = near_zero(tilt * x, close);
      const F powers = select(close, base * m.m1, tilted(z, v) * inv_u_ * R - base);
      term = select(near, base * (near_zero(x, near).psi - m.psi / tilt), (other - base) - powers / tilt) /
             (1 - tilt);
      term = select(no_v, q / plan_.order, select(no_z, p / b_, term));
    } else {
      const F series = near_zero(d, near).psi;
      term = select(near, p * series, (q - p) - select(p > 0., p * d, F{}));  // d may be inf
      term = select(no_v, q, term);
    }
    f_ += select(no_z & no_v, F{}, term);
  }

  // The term of D and G of a class of the mixture family; |x| may be beyond what an exponential takes.
  KD_HD Kept<F> mixed(F z, F v) const {
    const Int no_z = masked(z), no_v = masked(v);
    const F p = exp_v(v) * inv_v_, q = exp_z(z) * inv_z_, d = log_ratio(z, v);
    const bool flip = plan_.student_base;
    const F b = flip ? q : p, o = flip ? p : q, x = flip ? -d : d;
    const Int near = (abs_of(x) < .5) & ~(no_z | no_v);
    const ExpM1<F> m = near_zero(x, near);
    const F more = select(near, b * m.m1, o - b);
    if (plan_.tvd) {
      const F sign = select(more > F{}, splat<F>(.5), select(more < F{}, splat<F>(-.5), F{}));
      return {more * sign, q * sign, F{}};
    }
    const double l = plan_.mixture.l, keep = plan_.mixture.co_l;
    const MixedTerm<F> close = mixed_term(select(near, x, F{}), m, plan_.mixture);
    // Beyond 700 either way one of b and o is 0: what is times the other, u or w, is what it is at 700. w is
    // not x - u there: where x is a large finite mask's, the two agree to all their digits.
    const F least = select(x < -700., splat<F>(-700), x),
            most = l > 0 ? select(least > 700., splat<F>(700), least) : least;
    const F u = l > 0 ? log1p_psi(expm1_psi(most * kLog2e).m1 * l).log : F{};
    const F w = most - u, mixture = b + more * l, share = select(mixture > 0., more / mixture, F{});
    const F far = (more * l - b * u) * plan_.mixture.c_base + (o * w - more * keep) * plan_.mixture.c_other;
    F term = select(near, b * close.term, far);
    const F far_xi =
        (flip ? u * -plan_.mixture.c_base : w * plan_.mixture.c_other) + share * plan_.mixture.share_weight;
    F G = q * select(near, close.xi, far_xi);
    const Int only_b = flip ? no_v & ~no_z : no_z & ~no_v, only_o = flip ? no_z & ~no_v : no_v & ~no_z;
    const double o_alone = l > 0 ? plan_.mixture.other_alone_term : 0,
                 o_moves = l > 0 && !flip ? plan_.mixture.other_alone_xi : 0,
                 b_moves = flip ? plan_.mixture.base_alone_xi : 0;
    term = select(no_z & no_v, F{},
                  select(only_b, b * plan_.mixture.base_alone_term, select(only_o, o * o_alone, term)));
    return {term, select(no_z & no_v, F{}, select(only_b, b * b_moves, select(only_o, o * o_moves, G))), F{}};
  }

  KD_HD F moved(F z, F v) const {
    const Int no_z = masked(z), no_v = masked(v);
    const F q = exp_z(z) * inv_z_;
    if (plan_.support) return plan_.reverse ? F{} : select(no_v, q, -q * ratio_);
    if (plan_.extreme) return select(no_z, F{}, select(chosen(z, v), -exp_set(z) * in_set_, q)) * sign_;
    if (plan_.mixed) {
      const F own = mixed(z, v).em - q * moved_;
      return select(no_z, F{}, infinite_ ? splat<F>(NAN) : own);
    }
    const F p = exp_v(v) * inv_v_, d = log_ratio(z, v);
    const bool plain = !plan_.tilted || infinite_;
    const F w = plain ? p : tilted(z, v) * inv_u_;
    // log(w / p), or log(w / q), which is 0 as the order goes to 0
    const F x = plain ? F{} : plan_.student_base ? -plan_.order * d - log_r_ : b_ * d - log_r_;
    const bool of_q = !plain && plan_.student_base;
    // of a large d little is left in x
    const Int small = of_q ? abs_of(plan_.order * d) < 8. : abs_of(d) < .5,
              near = small & (abs_of(x) < .5) & ~(no_z | no_v);
    const F m1 = near_zero(x, near).m1,
            g = select(near, of_q ? -q * m1 : p * (near_zero(d, near).m1 - m1), q - w);
    return select(no_z, F{}, g * gain_);  // a masked class of the student is not moved
  }

  const Plan &plan_;
  const Crew &crew_;
  const double k_, b_, sign_;
  F mz = splat<F>(-INFINITY), mv = splat<F>(-INFINITY), mu_ = splat<F>(-INFINITY),
    least_v_ = splat<F>(INFINITY);
  Int nan_z_{}, nan_v_{}, lone_p_{}, lone_q_{};
  F sz_{}, sv_{}, sd_{}, su_{}, out_{}, in_{}, f_{};
  double base_z_ = 0, base_v_ = 0, apart_ = 0, top_z_ = 0, top_v_ = 0, top_u_ = 0, inv_z_ = 0, inv_v_ = 0,
         inv_u_ = 1, shift_ = 0, log_v_ = 0, log_r_ = 0, ratio_ = 0, least_ = 0, top_set_ = 0, in_set_ = 0,
         moved_ = 0, gain_ = 1;
  bool broken_ = false, broken_student_ = false, infinite_ = false;
};

}  // namespace KD_LEVEL
}  // namespace kd

// The mixture family and TVD in fp64 (math/mixture.h).
#pragma once
#include "row.h"

namespace kd {
namespace KD_LEVEL {

template <class F, class Crew> class CarefulMixture : public CarefulRow<F, Crew> {
  using Base = CarefulRow<F, Crew>;
  using Int = IntOf<F>;

 public:
  using Base::Base;

  template <class Classes> KD_HD double measure(Classes classes) {
    if (!this->find_tops(classes)) return NAN;
    this->find_softmaxes(classes, [](F, F, F, F) {});
    const Mixed<double> &mix = this->plan_.mixture;
    infinite_ = (!(mix.other_alone_term < INFINITY) && this->has_lone_q_) ||
                (mix.c_back > 0 && (this->has_lone_p_ || this->has_lone_q_));
    if (infinite_) return INFINITY;
    F terms{}, G{};
    classes([&](F z, F v) {
      const Term x = term_of(z, v);
      terms += x.term;
      G += x.G;
    });
    M_ = this->crew_.sum(G);
    return larger(this->crew_.sum(terms), 0.);
  }

  // T dD/dz of a class: G - q M.
  KD_HD F gradient(F z, F v) const {
    if (this->broken_) return splat<F>(NAN);
    const F q = this->exp_z(z) * this->inv_z_, own = term_of(z, v).G - q * M_;
    return select(masked(z), F{}, infinite_ ? splat<F>(NAN) : own);
  }

 private:
  struct Term { F term, G; };
  // A class as the base and the other have it: x = log(o / b), more = o - b.
  struct Seen {
    F b, o, x, q, more;
    Int near;
    ExpM1<F> m;
  };

  KD_HD Seen see(F z, F v) const {
    Seen s;
    const F p = this->exp_v(v) * this->inv_v_, d = this->log_ratio(z, v);
    s.q = this->exp_z(z) * this->inv_z_;
    s.b = this->plan_.base(s.q, p);
    s.o = this->plan_.other(s.q, p);
    s.x = this->plan_.base(-d, d);
    s.near = (abs_of(s.x) < .5) & ~(masked(z) | masked(v));
    s.m = near_zero(s.x, s.near);
    s.more = select(s.near, s.b * s.m.m1, s.o - s.b);
    return s;
  }

  // The term of D and G of a class.
  KD_HD Term term_of(F z, F v) const {
    const Seen s = see(z, v);
    if (this->plan_.mixture.tvd) {
      const F sign = select(s.more > F{}, splat<F>(.5), select(s.more < F{}, splat<F>(-.5), F{}));
      return {s.more * sign, s.q * sign};
    }
    const MixedTerm<F> close = mixed_term(select(s.near, s.x, F{}), s.m, this->plan_.mixture);
    if (this->plan_.mixture.c_back > 0) return take_lone(term_both_ways(s, close), s, z, v);
    const Term far = term_of_far(s);
    return take_lone({select(s.near, s.b * close.term, far.term), s.q * select(s.near, close.xi, far.G)}, s,
                     z, v);
  }

  // D's term and xi of a class whose |x| may be beyond what an exponential takes. Beyond 700 either way one
  // of b and o is 0: what is times the other, u or w, is what it is at 700. w is not x - u there: where x is
  // a large finite mask's, the two agree to all their digits.
  KD_HD Term term_of_far(const Seen &s) const {
    const Mixed<double> &mix = this->plan_.mixture;
    const double l = mix.l;
    const F least = select(s.x < -700., splat<F>(-700), s.x),
            most = l > 0 ? select(least > 700., splat<F>(700), least) : least;
    const F u = l > 0 ? log1p_psi(expm1_psi(most * kLog2e).m1 * l).log : F{};
    const F w = most - u, m = s.b + s.more * l, share = select(m > 0., s.more / m, F{});
    const F term = (s.more * l - s.b * u) * mix.c_base + (s.o * w - s.more * mix.co_l) * mix.c_other;
    return {term, this->plan_.base(u * -mix.c_base, w * mix.c_other) + share * mix.share_weight};
  }

  // The same of KL(o, b) and KL(b, o); G rather than xi, which may be beyond reach where q is 0.
  KD_HD Term term_both_ways(const Seen &s, const MixedTerm<F> &close) const {
    const double there = this->plan_.mixture.c_other, back = this->plan_.mixture.c_back;
    const F term = (s.o * s.x - s.more) * there + (s.more - s.b * s.x) * back,
            G = -(s.more * there + s.b * s.x * back);
    return {select(s.near, s.b * close.term, term), select(s.near, s.b * close.xi, G)};
  }

  // Classes that only one of the two has, or neither.
  KD_HD Term take_lone(const Term &x, const Seen &s, F z, F v) const {
    const Mixed<double> &mix = this->plan_.mixture;
    const Int no_z = masked(z), no_v = masked(v), lone_p = no_z & ~no_v, lone_q = no_v & ~no_z;
    const Int only_b = this->plan_.base(lone_q, lone_p), only_o = this->plan_.other(lone_q, lone_p);
    const double other_term = mix.l > 0 ? mix.other_alone_term : 0,
                 other_xi = this->plan_.base(0., mix.l > 0 ? mix.other_alone_xi : 0),
                 base_xi = this->plan_.base(mix.base_alone_xi, 0.);
    const F term = select(only_b, s.b * mix.base_alone_term, select(only_o, s.o * other_term, x.term));
    const F G = select(only_b, s.b * base_xi, select(only_o, s.o * other_xi, x.G));
    return {select(no_z & no_v, F{}, term), select(no_z & no_v, F{}, G)};
  }

  double M_ = 0;
  bool infinite_ = false;
};

}  // namespace KD_LEVEL
}  // namespace kd

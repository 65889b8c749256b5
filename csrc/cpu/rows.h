// A row, block by block: what is kept of each block, and where.
#pragma once
#include "block.h"
#include "../math/transform.h"
#include "../moments.h"

namespace kd {
namespace KD_LEVEL {
namespace {  // cpu.cpp is alone in including it, and a compiler does more with what nobody else can call

// What careful.h asks of the lanes of a vector.
struct Lanes {
  double sum(VD x) const {
    double s = 0;
    for (int i = 0; i < Vec<double>::W; i++) s += x[i];
    return s;
  }
  double largest(VD x) const {
    double s = x[0];
    for (int i = 1; i < Vec<double>::W; i++) s = x[i] > s ? x[i] : s;
    return s;
  }
  bool any(VL x) const {
    int64_t s = 0;
    for (int i = 0; i < Vec<double>::W; i++) s |= x[i];
    return s != 0;
  }
};

KD_HD const char *at(const void *p, int32_t dtype, const int64_t *stride, const kd_call &c, int64_t row) {
  return (const char *)p + (row / c.inner * stride[0] + row % c.inner * stride[1]) * element_size(dtype);
}

// What one thread works with: room for a block, and its share of the workspace.
template <class Real> struct Desk {
  alignas(64) Real b[kSlot<Real>], o[kSlot<Real>], slot[4 * kSlot<Real>], g[kSlot<Real>];
  Real *workspace = nullptr;
  int64_t capacity = 0;  // blocks that fit the workspace
};

template <class Real> class RowJob {
 public:
  RowJob(const kd_call &c, const Plan &p)
      : c_(c),
        plan_(p),
        of_student_(c.student_scale, c.student_softcap),
        of_teacher_(c.teacher_scale, c.teacher_softcap),
        blocks_((c.vocab + kBlock<Real> - 1) / kBlock<Real>) {
    if (p.mixed) mix_ = narrowed(p.mixture, Real());
    third_ = p.tilted && !p.student_base;
    arrays_ = 2 + third_ + hard();
    size_ = element_size(c.grad_dtype);
    const double unit = by_class() ? 1 : c.student_scale;
    grad_scale_ = c.grad_scale * unit;
    hard_grad_scale_ = c.hard_grad_scale * unit;
  }
  int64_t blocks() const { return blocks_; }
  bool mixed() const { return plan_.mixed; }
  int64_t slot_bytes() const { return arrays_ * kSlot<Real> * sizeof(Real); }
  bool entropies() const { return c_.stats || plan_.entropy; }
  bool hard() const { return c_.labels && (c_.hard_scale != 0 || c_.hard_grad_scale != 0); }

  // Whether each class of the gradient has a factor and a summand of its own.
  bool by_class() const { return of_student_.softcap > 0 || smooth(); }
  bool smooth() const { return hard() && c_.label_smoothing != 0; }

  struct State {
    Part *parts;
    SmoothPart *hard_parts;
    StatPart *stat_parts;
    Row row;
    HardRow hard;
    double weight;
  };

  bool begin(State &s, int64_t row) const {  // false: the row counts for nothing
    s.weight = c_.weight ? c_.weight[row] : 1;
    if (s.weight != 0) return true;
    c_.loss[row] = 0;
    if (c_.grad) std::memset(grad(row), 0, c_.grad_width * size_);
    if (c_.stats)
      for (int i = 0; i < KD_STATS; i++) c_.stats[row * KD_STATS + i] = NAN;
    return false;
  }

  void sweep_blocks(State &s, int64_t row, int64_t lo, int64_t hi, Desk<Real> &desk) const {
    const double ref = s.row.shift / plan_.k;
    bool lost = false;
    for (int64_t i = lo; i < hi && !lost; i++) {  // once the row is lost, nothing that follows is used
      const int64_t n = length(i);
      Real *keep[kKept];
      slots(desk, i, lo, keep);
      with_block(row, i, desk, [&](auto *z, auto *b, auto *o) {
        if (hard()) s.hard_parts[i] = hard_block(z, n, keep[3]);
        if (plan_.careful) return;
        measure_block(b, o, n, plan_, entropies() ? s.stat_parts + i : nullptr, s.row.refine ? &ref : nullptr,
                      keep, s.parts[i], desk.b, desk.o);
        lost = s.parts[i].care == kLost;
      });
    }
  }

  void close(State &s, int64_t row, Desk<Real> &desk) const {
    bool lost = plan_.careful;
    for (int64_t i = 0; i < blocks_ && !lost; i++) lost = s.parts[i].care == kLost;
    const bool again = s.row.refine;
    s.row = Row();
    if (!lost) s.row = close_row(s.parts, int(blocks_), plan_);
    if (again) s.row.refine = false;
    s.row.lost |= lost;
    if (!s.row.lost && !s.row.refine && !plan_.mixed) finish(s, row, s.row.value, desk, nullptr);
  }

  // The second sweep of the mixture family, backwards, as the last block is still on the desk; and its close.
  void mix_blocks(State &s, int64_t row, int64_t lo, int64_t hi, Desk<Real> &desk) const {
    for (int64_t i = hi - 1; i >= lo; i--) {
      Real *keep[kKept];
      slots(desk, i, lo, keep);
      with_block(row, i, desk, [&](auto *z, auto *b, auto *o) {
        mix_block(s, s.parts[i], i, kept(i, lo, desk) || i == hi - 1, z, b, o, keep, desk);
      });
    }
  }
  void close_mixed_row(State &s, int64_t row, Desk<Real> &desk) const {
    for (int64_t i = 0; i < blocks_; i++) s.row.lost |= s.parts[i].care == kLost;
    if (!s.row.lost) close_mixed(s.parts, int(blocks_), plan_, s.row);
    if (!s.row.lost) finish(s, row, s.row.value, desk, nullptr);
  }

  void emit_blocks(const State &s, int64_t row, int64_t lo, int64_t hi, Desk<Real> &desk,
                   bool streaming) const {
    // from the block that was swept last, which is still on the desk
    for (int64_t turn = lo; turn < hi; turn++) {
      const int64_t i = plan_.mixed ? turn : lo + hi - 1 - turn, n = length(i);
      Real *keep[kKept];
      slots(desk, i, lo, keep);
      const bool there = kept(i, lo, desk), kept_here = there || turn == lo, hard_kept = there || i == hi - 1;
      if (!kept_here || (hard() && !hard_kept)) {
        with_block(row, i, desk, [&](auto *z, auto *b, auto *o) {
          Part p = s.parts[i];
          if (hard()) hard_block(z, n, keep[3]);
          if (kept_here) return;
          if (plan_.mixed)
            mix_block(s, p, i, false, z, b, o, keep, desk);
          else if (!p.empty())
            sweep(p.care, b, o, n, plan_, nullptr, keep, p, desk.b, desk.o);
        });
      }
      if (s.parts[i].empty())
        for (int j = 0; j < 3; j++)
          if (keep[j]) std::memset(keep[j], 0, kSlot<Real> * sizeof(Real));
      const Coefficients k = coefficients(s.parts[i], s.row, plan_, s.weight * grad_scale_);
      if (plan_.student_base && plan_.tilted && s.parts[i].lone) separate_lone(keep[0], keep[2], n, k);
      const Real *kept[4] = {keep[0]};
      double factors[4] = {k.C};
      int m = 1;
      if (keep[1]) {
        kept[m] = keep[1];
        factors[m++] = k.A;
      }
      if (keep[2]) {
        kept[m] = keep[2];
        factors[m++] = k.B;
      }
      const Real rest = plan_.tvd ? left_over(Real(k.A), Real(k.C), Real(k.end)) : 0;
      write(s, row, i, n, m, kept, factors, rest, keep[3], desk, streaming);
    }
  }

  // A row that the sweep could not take, whole.
  void careful_row(State &s, int64_t row, Desk<Real> &desk, bool streaming) const {
    with_careful<VD>(plan_, Lanes(), [&](auto &careful) { run_careful(careful, s, row, desk, streaming); });
  }

 private:
  template <class Row64>
  void run_careful(Row64 &careful, State &s, int64_t row, Desk<Real> &desk, bool streaming) const {
    constexpr int64_t N = kBlock<double>;
    alignas(64) double z[N], v[N], g[N];
    const Transform<double> of_z(c_.student_scale, c_.student_softcap),
        of_v(c_.teacher_scale, c_.teacher_softcap);
    const auto fill = [&](int64_t i, int64_t n) {
      load_row(student(row), c_.student_dtype, i, n, z);
      load_row(teacher(row), c_.teacher_dtype, i, n, v);
      if (of_z.any()) transform_row((const double *)z, n, of_z, z);
      if (of_v.any()) transform_row((const double *)v, n, of_v, v);
      const int64_t padded = round_up(n, Vec<double>::W);
      for (int64_t j = n; j < padded; j++) z[j] = v[j] = -INFINITY;
      return padded;
    };
    constexpr int W = Vec<double>::W;
    const auto classes = [&](auto body) {
      for (int64_t i = 0; i < c_.vocab; i += N) {
        const int64_t n = fill(i, smaller(N, c_.vocab - i));
        for (int64_t j = 0; j < n; j += W) body(load<VD>(z + j), load<VD>(v + j));
      }
    };
    const double value = careful.measure(classes);
    // a factor of 0 says that the soft term is not there, whatever it would be; the student's row breaks the
    // hard term too
    const double none = hard() && careful.broken_student() ? NAN : 0;
    if (hard() && !plan_.careful) {  // the sweep stopped where the row was lost
      for (int64_t i = 0; i < blocks_; i++) {
        with_block(row, i, desk,
                   [&](auto *z, auto *, auto *) { s.hard_parts[i] = hard_block(z, length(i), desk.slot); });
      }
    }
    Shapes shapes{};
    if (entropies()) shapes = careful.shapes(classes);
    finish(s, row, value, desk, &shapes, none);
    if (!c_.grad) return;
    const bool soft_counts = grad_scale_ != 0;
    const double scale = soft_counts ? s.weight * grad_scale_ : 1;
    Real *soft = desk.slot, *e1 = desk.slot + kSlot<Real>;
    for (int64_t i = 0; i < blocks_; i++) {
      const int64_t n = length(i), i0 = i * kBlock<Real>;
      if (hard()) with_block(row, i, desk, [&](auto *z, auto *, auto *) { hard_block(z, n, e1); });
      for (int64_t j = 0; j < n; j += N) {
        const int64_t m = smaller(N, n - j);
        if (!soft_counts) {
          for (int64_t l = 0; l < m; l++) soft[j + l] = Real(none);
          continue;
        }
        const int64_t padded = fill(i0 + j, m);
        for (int64_t l = 0; l < padded; l += W)
          store(g + l, careful.gradient(load<VD>(z + l), load<VD>(v + l)));
        for (int64_t l = 0; l < m; l++) soft[j + l] = Real(g[l]);
      }
      const Real *kept[4] = {soft};
      double factors[4] = {scale};
      write(s, row, i, n, 1, kept, factors, 0, e1, desk, streaming);
    }
  }

  // kept: what the first sweep left is where keep says
  template <class S>
  void mix_block(const State &s, Part &p, int64_t i, bool kept, const S *, const S *b, const S *o,
                 Real *const *keep, Desk<Real> &desk) const {
    if (p.empty()) return;
    Part again = p;
    if (!kept) sweep(p.care, b, o, length(i), plan_, nullptr, keep, again, desk.b, desk.o);
    sweep_mixed(b, o, length(i), plan_, mix_, s.row, keep, p, desk.b, desk.o);
  }

  template <class S> SmoothPart hard_block(const S *z, int64_t n, Real *e1) const {
    return smooth() ? sweep_hard<true>(z, n, e1) : sweep_hard<false>(z, n, e1);
  }

  // S: R, or what widens to it.
  template <class S, class R>
  static void transform_row(const S *x, int64_t n, const Transform<R> &t, R *out) {
    using F = typename Vec<R>::F;
    constexpr int W = Vec<R>::W;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      __builtin_prefetch(x + i + kBlock<R>);  // the next block
      store(out + i, transformed(load_as<F>(x + i), t));
    }
    R rest[W] = {};
    copy_row(x + i, n - i, rest);
    store(rest, transformed(load<F>(rest), t));
    std::memcpy(out + i, rest, (n - i) * sizeof(R));
  }
  // Classes of a row as Reals: where they lie, or in the buffer.
  const Real *fetch(const char *row, int32_t dtype, const Transform<Real> &t, int64_t i, int64_t n,
                    Real *buffer) const {
    if (element_size(dtype) == sizeof(Real) && !t.any()) return (const Real *)row + i;
    if (!t.any())
      load_row(row, dtype, i, n, buffer);
    else if (element_size(dtype) == sizeof(Real))
      transform_row((const Real *)row + i, n, t, buffer);
    else if constexpr (sizeof(Real) == 8) {
      load_row(row, dtype, i, n, buffer);
      transform_row((const Real *)buffer, n, t, buffer);
    } else if (dtype == KD_BF16)
      transform_row((const bf16 *)row + i, n, t, buffer);
    else
      transform_row((const f16 *)row + i, n, t, buffer);
    return buffer;
  }

  const char *student(int64_t row) const {
    return at(c_.student, c_.student_dtype, c_.student_stride, c_, row);
  }
  const char *teacher(int64_t row) const {
    return at(c_.teacher, c_.teacher_dtype, c_.teacher_stride, c_, row);
  }
  char *grad(int64_t row) const { return (char *)at(c_.grad, c_.grad_dtype, c_.grad_stride, c_, row); }
  int64_t length(int64_t block) const { return smaller(kBlock<Real>, c_.vocab - block * kBlock<Real>); }

  // body(student, base, other): the block where it lies if both rows are stored alike, else as Reals on the
  // desk.
  template <class Body> void with_block(int64_t row, int64_t block, Desk<Real> &desk, Body body) const {
    const int64_t i = block * kBlock<Real>, n = length(block);
    const char *z = student(row), *v = teacher(row);
    const auto with = [&](auto *z, auto *v) {
      body(z, plan_.student_base ? z : v, plan_.student_base ? v : z);
    };
    if constexpr (sizeof(Real) == 4)
      if (c_.student_dtype == c_.teacher_dtype && !of_student_.any() && !of_teacher_.any()) {
        if (c_.student_dtype == KD_BF16) return with((const bf16 *)z + i, (const bf16 *)v + i);
        if (c_.student_dtype == KD_F16) return with((const f16 *)z + i, (const f16 *)v + i);
      }
    Real *const first = plan_.student_base ? desk.b : desk.o, *const second =
                                                                  plan_.student_base ? desk.o : desk.b;
    with(fetch(z, c_.student_dtype, of_student_, i, n, first),
         fetch(v, c_.teacher_dtype, of_teacher_, i, n, second));
  }

  bool kept(int64_t i, int64_t lo, const Desk<Real> &desk) const { return i - lo < desk.capacity; }

  // Where block i keeps e, em, et and the hard term's e1; null for what the family does not need. The mixture
  // family's second sweep leaves q and xi in the places of e and em.
  void slots(Desk<Real> &desk, int64_t i, int64_t lo, Real **keep) const {
    Real *p = i - lo < desk.capacity ? desk.workspace + (i - lo) * arrays_ * kSlot<Real> : desk.slot;
    keep[0] = p;
    p += kSlot<Real>;
    keep[1] = !plan_.tilted || third_ ? p : nullptr;
    p += keep[1] ? kSlot<Real> : 0;
    keep[2] = plan_.tilted ? p : nullptr;
    p += keep[2] ? kSlot<Real> : 0;
    keep[3] = p;
  }

  // Classes that the teacher masks have et = -e, and q = (C - B) e as their gradient. Where C and B are much
  // larger than their difference (the supports have little in common), e takes the ratio, so that the two are
  // not subtracted class by class.
  static void separate_lone(Real *e, Real *et, int64_t n, const Coefficients &k) {
    const double q = k.C - k.B;
    if (!(std::fabs(k.C) > std::fabs(q))) return;
    const Real ratio = Real(q / k.C);
    for (int64_t j = 0; j < n; j++) {
      const bool lone = et[j] == -e[j];
      e[j] = lone ? e[j] * ratio : e[j];
      et[j] = lone ? 0 : et[j];
    }
  }

  // shapes: of a row that careful.h has measured; none: the soft term where it has no weight
  void finish(State &s, int64_t row, double value, Desk<Real> &desk, const Shapes *shapes,
              double none = 0) const {
    Shapes found{};
    if (entropies()) found = shapes ? *shapes : shapes_of(s.parts, s.stat_parts, int(blocks_), s.row, plan_);
    if (plan_.entropy) value += found.of_v;
    double loss = c_.value_scale != 0 ? c_.value_scale * value : none, cross_entropy = NAN;
    if (hard()) {
      Real label;
      label = *fetch(student(row), c_.student_dtype, of_student_, c_.labels[row], 1, &label);
      s.hard =
          close_hard(c_, int(blocks_), [&](int i) -> const SmoothPart & { return s.hard_parts[i]; }, label);
      cross_entropy = cross_entropy_of(s.hard);
      loss += c_.hard_scale * hard_value(c_, s.hard);
    }
    c_.loss[row] = s.weight * loss;
    if (c_.stats) put_stats(s, row, value, cross_entropy, found, shapes, desk);
  }

  void put_stats(const State &s, int64_t row, double value, double cross_entropy, const Shapes &found,
                 bool lost, Desk<Real> &desk) const {
    double *out = c_.stats + row * KD_STATS;
    out[KD_DIVERGENCE] = value;
    out[KD_CROSS_ENTROPY] = cross_entropy;
    out[KD_STUDENT_LSE] = found.lse_z;
    out[KD_TEACHER_LSE] = found.lse_v;
    out[KD_STUDENT_ENTROPY] = found.of_z;
    out[KD_TEACHER_ENTROPY] = found.of_v;
    out[KD_STUDENT_TOP] = broken(found) ? NAN : double(top_class(s, row, true, lost, desk));
    out[KD_TEACHER_TOP] = broken(found) ? NAN : double(top_class(s, row, false, lost, desk));
  }

  // The first class with the largest logit: of the block that has it, which a row that was lost has yet to
  // look for.
  int64_t top_class(const State &s, int64_t row, bool of_student, bool lost, Desk<Real> &desk) const {
    const bool base = of_student == plan_.student_base;
    double top = -INFINITY;
    int64_t block = 0, at = 0;
    for (int64_t i = 0; i < blocks_; i++) {
      double t = base ? (s.parts[i].s > 0 ? s.parts[i].top : -INFINITY) : s.stat_parts[i].top_o;
      if (lost)
        with_block(row, i, desk,
                   [&](auto *, auto *b, auto *o) { t = largest<Real>(base ? b : o, length(i)); });
      if (t > top) {
        top = t;
        block = i;
      }
    }
    if (base && !lost)
      at = s.stat_parts[block].first_b;
    else
      with_block(row, block, desk,
                 [&](auto *, auto *b, auto *o) { at = find(base ? b : o, length(block), Real(top)); });
    return block * kBlock<Real> + at;
  }

  // rest: left_over of TVD
  void write(const State &s, int64_t row, int64_t block, int64_t n, int m, const Real **kept, double *factors,
             Real rest, const Real *e1, Desk<Real> &desk, bool streaming) const {
    const int64_t i0 = block * kBlock<Real>;
    const bool mixed = plan_.mixed && m == 2;  // careful rows come as one array
    const Emission how = !mixed ? kSum : rest != 0 ? kAndRest : kTimesFirst;
    char *out = grad(row);
    int64_t label = -1;
    const double scale = s.weight * hard_grad_scale_;
    if (hard()) {
      const bool any = s.hard_parts[block].s > 0;
      kept[m] = e1;
      factors[m++] =
          any ? scale * (1 + s.hard.pull) * std::exp(s.hard_parts[block].top - s.hard.top) / s.hard.s : 0;
      label = c_.labels[row] - i0;
      if (label < 0 || label >= n) label = -1;
    }
    // by class: as Reals first
    const bool apart = by_class();
    if (apart)
      emit(m, how, kept, factors, rest, desk.g, sizeof(Real) == 8 ? KD_F64 : KD_F32, 0, n, false);
    else
      emit(m, how, kept, factors, rest, out, c_.grad_dtype, i0, n, streaming && label < 0);
    if (label >= 0) {
      double g = mixed ? kept[0][label] * (double(Real(factors[1])) * kept[1][label] +
                                           double(Real(factors[0])) + double(rest))
                       : 0;
      for (int j = mixed ? 2 : 0; j + 1 < m; j++) g += double(Real(factors[j])) * kept[j][label];
      const Real value = Real(g + scale * label_gradient(c_, s.hard));
      if (apart)
        desk.g[label] = value;
      else
        store_row(out, c_.grad_dtype, label + i0, 1, false, Real(0),
                  [=](int64_t) { return splat<typename Vec<Real>::F>(value); });
    }
    if (apart)
      put_by_class(row, i0, n, smooth() ? -scale * c_.label_smoothing / s.hard.count : 0, desk, streaming);
    if (block == blocks_ - 1 && c_.grad_width > c_.vocab)
      std::memset(out + c_.vocab * size_, 0, (c_.grad_width - c_.vocab) * size_);
  }

  // desk.g and what each class of it has besides
  void put_by_class(int64_t row, int64_t i0, int64_t n, double each, Desk<Real> &desk, bool streaming) const {
    using F = typename Vec<Real>::F;
    const Real *z = desk.b, more = Real(each);  // a copy: the row may end where the last vector does not
    const Transform<Real> t = of_student_;
    if (t.any())
      fetch(student(row), c_.student_dtype, t, i0, n, desk.b);
    else
      load_row(student(row), c_.student_dtype, i0, n, desk.b);
    store_row(
        grad(row), c_.grad_dtype, i0, n, streaming, Real(0),
        [=, &desk](int64_t j) __attribute__((always_inline)) {
          const F at = load<F>(z + j);
          return F((load<F>(desk.g + j) + select(at > Real(-INFINITY), splat<F>(more), F{})) * slope(at, t));
        });
  }

  const kd_call &c_;
  const Plan &plan_;
  const Transform<Real> of_student_, of_teacher_;
  double grad_scale_, hard_grad_scale_;
  Mixed<Real> mix_{};
  const int64_t blocks_;
  int64_t size_;
  int arrays_;
  bool third_;
};

template <class Real>
void run_alone(const RowJob<Real> &job, typename RowJob<Real>::State &s, int64_t row, Desk<Real> &desk,
               bool write, bool streaming) {
  s.row = Row();
  if (!job.begin(s, row)) return;
  do {
    job.sweep_blocks(s, row, 0, job.blocks(), desk);
    job.close(s, row, desk);
  } while (s.row.refine);
  if (job.mixed() && !s.row.lost) {
    job.mix_blocks(s, row, 0, job.blocks(), desk);
    job.close_mixed_row(s, row, desk);
  }
  if (s.row.lost)
    job.careful_row(s, row, desk, streaming);
  else if (write)
    job.emit_blocks(s, row, 0, job.blocks(), desk, streaming);
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

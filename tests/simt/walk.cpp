// Walks the kernels through every geometry on host threads, in a program of its own, for AddressSanitizer and
// ThreadSanitizer. What is computed is checked elsewhere (test_cuda.py); here only that each row's loss is
// positive and its gradient sums to nothing (but for slopes).
//
//     walk [race | overrun]     with a fault that a sanitizer must report
#define KD_TEST_GEOMETRY 1
#define KD_ARCHS "host threads"
#define KD_PIECES(family) X(family, 2, 2) X(family, 4, 4)
#include "../../csrc/cuda.cu"

namespace {

struct Case {
  int capability, processors, shared_per_block, shared_per_processor, clusters, rows, vocab, kind;
};
constexpr int kHopper = 227 << 10, kHopperAll = 228 << 10;
const Case kCases[] = {
    {80, 2, kHopper, kHopperAll, 1, 5, 203, 1},   // a warp to a row, two rows to a block
    {80, 2, kHopper, kHopperAll, 1, 3, 500, 2},   // a block to a row
    {80, 2, kHopper, kHopperAll, 1, 2, 2001, 2},  // of several tiles, read twice
    {80, 8, kHopper, kHopperAll, 1, 3, 1503, 2},  // three blocks to a row
    {80, 4, kHopper, kHopperAll, 1, 3, 3001, 2},  // two blocks of several tiles
    {80, 4, 6 << 10, kHopperAll, 1, 2, 2001, 2},  // no room for a tile ahead
    {90, 8, kHopper, kHopperAll, 2, 7, 500, 3},   // clusters of 1, 2 and 4; more rows than clusters
    {90, 8, kHopper, kHopperAll, 2, 7, 1003, 3},
    {90, 8, 14 << 10, kHopperAll, 1, 5, 2000, 3},  // a ring of two
    {90, 8, kHopper, kHopperAll, 1, 3, 3999, 4},
};

struct Rng {
  uint32_t state = 1;
  float next() {
    state = state * 1664525 + 1013904223;
    return float(state >> 8) / (1 << 24) * 6 - 3;
  }
};

template <class T> T *buffer(int64_t n) {  // to the byte, on 16
  void *p = nullptr;
  gpu::require(!posix_memalign(&p, 256, n * sizeof(T)), "no memory");
  return (T *)p;
}

double value(const void *p, int32_t dtype, int64_t i) {
  return dtype == KD_F32 ? ((const float *)p)[i] : gpu::from_bf16(((const uint16_t *)p)[i]);
}

// A divergence: its family and numbers, as Form has them.
struct Member {
  int32_t family;
  double order = 1, mix = 0, teacher = 0, student = 0;
};
const Member kKl{0}, kCe{1}, kJsd{4, 1, .5, .5, .5}, kReverseKl{4, 1, 0, 0, 1}, kSkewReverse{4, 1, .9, 0, 1},
    kSkewKl{4, 1, .1, 1, 0}, kTvdMember{5};

void run(const Case &k, int32_t dtype, const Member &d, double temperature, bool in_place, bool masked,
         double softcap = 0) {
  gpu::device = {k.capability, k.processors, k.shared_per_block, k.shared_per_processor, k.clusters};
  const int size = dtype == KD_F32 ? 4 : 2;
  const int64_t n = int64_t(k.rows) * k.vocab;
  char *z = buffer<char>(n * size), *v = buffer<char>(n * size), *g = in_place ? z : buffer<char>(n * size);
  int64_t *labels = buffer<int64_t>(k.rows);
  double *weight = buffer<double>(k.rows), *loss = buffer<double>(k.rows);
  Rng rng;
  for (int64_t i = 0; i < n; i++) {
    float a = rng.next(), b = a + rng.next() / 4;
    if (masked && i % k.vocab % 3 == 1) a = b = -INFINITY;
    if (dtype == KD_F32) {
      ((float *)z)[i] = a;
      ((float *)v)[i] = b;
    } else {
      ((uint16_t *)z)[i] = uint16_t(gpu::to_bf16(a));
      ((uint16_t *)v)[i] = uint16_t(gpu::to_bf16(b));
    }
  }
  for (int r = 0; r < k.rows; r++) {
    labels[r] = masked ? 0 : r * 37 % k.vocab;
    weight[r] = r == 1 ? 0 : 1;
  }
  kd_call c{};
  c.student = z;
  c.teacher = v;
  c.grad = g;
  c.labels = labels;
  c.weight = weight;
  c.loss = loss;
  c.rows = k.rows;
  c.inner = k.rows;
  c.vocab = c.grad_width = k.vocab;
  c.student_stride[1] = c.teacher_stride[1] = c.grad_stride[1] = k.vocab;
  c.student_dtype = c.teacher_dtype = dtype;
  c.family = d.family;
  c.order = d.order;
  c.mix = d.mix;
  c.teacher_part = d.teacher;
  c.student_part = d.student;
  c.factor = c.limit = 1;
  c.student_scale = c.teacher_scale = 1;
  c.student_softcap = softcap;
  c.label_smoothing = softcap ? .1 : 0;
  c.stats = softcap || masked ? buffer<double>(k.rows * KD_STATS) : nullptr;
  c.temperature = temperature;
  if (temperature == 0) {  // the rows' own
    double *own = buffer<double>(k.rows);
    for (int r = 0; r < k.rows; r++) own[r] = r == 1 ? NAN : r + .5;
    c.temperatures = own;
    c.squared = in_place;
  }
  c.value_scale = c.grad_scale = 1;
  c.hard_scale = c.hard_grad_scale = .1;
  const kd_figures f{k.capability, k.processors, k.shared_per_block, k.shared_per_processor};
  kd_geometry geometry{};
  gpu::require(!kd_plan(&c, &f, &geometry) && (geometry.kind == k.kind || geometry.kind == 0),
               "not the geometry that the case is about");
  c.workspace_size = kd_workspace(&c);
  gpu::require(c.workspace_size >= 0, "no geometry");
  c.workspace = buffer<char>(c.workspace_size + 1);
  gpu::require(kd_loss(&c) == KD_OK, "kd_loss refused");
  for (int r = 0; r < k.rows; r++) {
    double sum = 0, all = 0;
    for (int64_t i = 0; i < k.vocab; i++) {
      const double x = value(g, dtype, r * int64_t(k.vocab) + i);
      sum += x;
      all += std::fabs(x);
    }
    gpu::require(r == 1 ? loss[r] == 0 && all == 0
                        : loss[r] > 0 && all > 0 && (softcap || std::fabs(sum) < 1e-2 * all),
                 "a row is wrong");
  }
  for (void *p : {(void *)z, (void *)v, (void *)labels, (void *)weight, (void *)loss, (void *)c.stats,
                  (void *)c.temperatures, c.workspace})
    std::free(p);
  if (!in_place) std::free(g);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc > 1) {
    gpu::planted = argv[1][0] == 'r' ? gpu::kRace : gpu::kOverrun;
    run(kCases[gpu::planted == gpu::kRace ? 1 : 8], KD_BF16, kKl, 1, false, false);
    return 0;
  }
  int i = 0;
  for (const Case &k : kCases) {
    const int32_t dtype = i % 2 ? KD_F32 : KD_BF16;
    const int room = k.shared_per_block >> 10;
    const int32_t own = room < 64 ? int32_t(KD_BF16) : dtype;
    const Member mixtures[] = {kJsd, kTvdMember, kReverseKl, kSkewReverse};
    run(k, own, i % 3 == 1 ? kCe : kKl, 2, i % 2, false);
    run(k, own, Member{i % 2 ? 2 : 3, i % 2 ? .3 : 2}, 1, false, i % 3 == 0);  // Renyi, Alpha
    run(k, own, mixtures[i % 4], 1, i % 2 == 0, i % 3 == 1);
    run(k, own, mixtures[(i + 1) % 4], 1, i % 2, i % 3 == 0);
    run(k, own, i % 2 ? kSkewKl : Member{2, .3}, 1, i % 4, i % 3 == 2);
    i++;
  }
  run(kCases[2], KD_BF16, kKl, 1, true, false, 2);
  run(kCases[3], KD_F32, kCe, .01, true, false);
  run(kCases[0], KD_F32, kKl, 1, false, false, 2);  // with a transform
  run(kCases[2], KD_BF16, kJsd, 1, true, false, 2);
  run(kCases[4], KD_BF16, Member{2, 2}, 1, false, false, 2);
  run(kCases[1], KD_F32, Member{6}, 1, true, true);  // order 0, in fp64 throughout
  run(kCases[7], KD_BF16, kKl, INFINITY, false, false);
  run(kCases[3], KD_F32, kKl, .01, true, false);  // lost to a float's range: left, and computed again
  run(kCases[3], KD_F32, kReverseKl, .01, true, false);
  run(kCases[3], KD_BF16, kKl, 0, true, false);  // temperatures of the rows
  run(kCases[1], KD_F32, kJsd, 0, false, true);
  std::puts("walked");
}

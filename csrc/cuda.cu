// The CUDA library. Compiled once for each piece (KD_FAMILY = Plain, Tilted, Mixture; KD_BASE, KD_OTHER = 2,
// 4 bytes: the loss kernels of a family and a pair of widths) and once more without, for the C functions and
// the other kernels. No torch, no Python; the CUDA runtime is linked in.
//
// A call: tickets are zeroed where blocks share rows, the kernel of its geometry runs, then careful_rows
// looks at the losses and computes the rows that were left, in fp64.
// Everything is put on the stream of the call; nothing waits for it.
#define KD_LEVEL device
#include "cuda/plan.h"

namespace kd {
namespace KD_LEVEL {

// Launch the geometry's kernel; `most` is asked instead where it is given: how many of its clusters the
// device holds.
template <class Family, int kB, int kO>
int launch_piece(const kd_geometry &g, const Job &job, void *stream, int *most) {
  const gpu::Shape shape{g.blocks, g.threads, g.cluster, g.shared};
  const auto with = [&](auto kernel) {
    if (const int error = gpu::allow(kernel, g.kind == kCluster || g.kind == kWideCluster)) return error;
    if (most) return gpu::most_clusters(kernel, shape, most);
    return gpu::launch(kernel, shape, stream, job);
  };
  switch (g.kind) {
    case kWarpRows: return with(loss_rows<typename Sizes<Family>::WarpRows, Family, kB, kO>);
    case kBlockRows: return with(loss_rows<typename Sizes<Family>::BlockRows, Family, kB, kO>);
    case kCluster: return with(loss_clusters<typename Sizes<Family>::Cluster, Family, kB, kO>);
    default: return with(loss_clusters<typename Sizes<Family>::WideCluster, Family, kB, kO>);
  }
}

#if defined(KD_FAMILY)
template int launch_piece<KD_FAMILY, KD_BASE, KD_OTHER>(const kd_geometry &, const Job &, void *, int *);
}  // namespace KD_LEVEL
}  // namespace kd
#else

#if !defined(KD_PIECES)
#define KD_PIECES(family) X(family, 2, 2) X(family, 2, 4) X(family, 4, 2) X(family, 4, 4)
#define X(family, base, other) \
  extern template int launch_piece<family, base, other>(const kd_geometry &, const Job &, void *, int *);
KD_PIECES(Plain)
KD_PIECES(Tilted)
KD_PIECES(Mixture)
#undef X
#endif
}  // namespace KD_LEVEL
}  // namespace kd

#include "cuda/careful.h"
#include "cuda/log_softmax.h"
#include "cuda/scale.h"

namespace kd {
namespace KD_LEVEL {
namespace {

int launch_loss(const kd_geometry &g, const Job &job, void *stream, int *most = nullptr) {
  const int zs = kept_size(job.call, job.call.student_dtype),
            vs = kept_size(job.call, job.call.teacher_dtype);
  const int base = job.plan.base(zs, vs), other = job.plan.other(zs, vs);
  return with_family(job.plan, [&](auto family) {
    using Family = decltype(family);
#define X(of, b, o)                              \
  if constexpr (std::is_same<Family, of>::value) \
    if (base == b && other == o) return launch_piece<of, b, o>(g, job, stream, most);
    KD_PIECES(Plain)
    KD_PIECES(Tilted)
    KD_PIECES(Mixture)
#undef X
    return int(KD_BAD_CALL);
  });
}

bool understood(const kd_call *c) {
  const auto dtype = [](int32_t x) { return x == KD_BF16 || x == KD_F16 || x == KD_F32; };
  return c && c->rows >= 0 && c->vocab > 0 && c->inner > 0 && c->grad_width >= c->vocab &&
         dtype(c->student_dtype) && dtype(c->teacher_dtype);
}

Job make_job(const kd_call &c) {
  Job job{};
  job.call = c;
  job.plan = make_plan(c, false);
  if (c.temperatures) job.plan.only_careful = true;  // the sweeps have one temperature for all rows
  with_family(job.plan, [&](auto family) {
    if (!decltype(family)::kTwice) return;
    job.mix = narrowed(job.plan.mixture, float());
    job.second_words = kSecondWords;
  });
  job.c = float(job.plan.c);
  job.c_low = job.plan.exact ? float(job.plan.c_low) : 0;
  job.tilt = float(job.plan.tilt);
  // nothing within it over- or underflows: 2^43 2^-125
  job.reach = float(43 / (std::fabs(job.plan.tilt) > 1 ? std::fabs(job.plan.tilt) : 1));
  job.hard = has_hard(c);
  job.smooth = job.hard && c.label_smoothing != 0;
  job.transformed = has_transform(c);
  job.entropies = c.stats || job.plan.entropy;
  job.student = Transform<float>(c.student_scale, c.student_softcap);
  job.teacher = Transform<float>(c.teacher_scale, c.teacher_softcap);
  return job;
}

int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }
int64_t ticket_bytes(const kd_call &c) { return round16((1 + kCounters * c.rows) * 4); }
int64_t workspace_of(const kd_call &c, const Job &job, const kd_geometry &g) {
  return g.parts > 1
             ? ticket_bytes(c) + c.rows * g.parts * g.tiles *
                                     (kWords + job.second_words + (job.entropies ? kStatWords : 0)) * 8
             : 0;
}

// The geometry on the call's device; clusters that the device does not hold are left for blocks.
int geometry_on(const kd_call &c, const Job &job, kd_geometry &g) {
  kd_figures f{};
  if (const int error = gpu::figures(c.device, f)) return KD_CUDA_ERROR + error;
  if (!make_geometry(c, job.plan, f, g)) return KD_BAD_CALL;
  if (g.kind != kCluster && g.kind != kWideCluster) return KD_OK;
  int most = 0;
  if (const int error = launch_loss(g, job, nullptr, &most)) return KD_CUDA_ERROR + error;
  if (most < 1) {
    f.capability = 80;
    return make_geometry(c, job.plan, f, g) ? KD_OK : KD_BAD_CALL;
  }
  g.blocks = g.cluster * (c.rows < most ? c.rows : most);
  return KD_OK;
}

int64_t workspace_on(const Job &job) {  // negative: a status
  kd_geometry g{};
  const int status = geometry_on(job.call, job, g);
  return status ? -status : workspace_of(job.call, job, g);
}

int run(Job &job) {
  const kd_call &c = job.call;
  kd_geometry g{};
  if (const int status = geometry_on(c, job, g)) return status;
  if (c.workspace_size < workspace_of(c, job, g)) return KD_BAD_CALL;
  const auto cuda = [](int error) { return error ? KD_CUDA_ERROR + error : KD_OK; };
  job.all = g.kind == kCarefulRows;
  if (!job.all) {
    job.parts = g.parts;
    job.tiles = g.tiles;
    job.stages = g.stages;
    job.team_bytes = g.kind == kWarpRows ? g.shared / (g.threads / 32) : g.shared;
    if (g.parts > 1) {
      job.tickets = (uint32_t *)c.workspace;
      job.state = (double *)((char *)c.workspace + ticket_bytes(c));
      if (const int error = gpu::zero(job.tickets, ticket_bytes(c), c.stream)) return cuda(error);
    }
    if (const int error = launch_loss(g, job, c.stream)) return error == KD_BAD_CALL ? error : cuda(error);
  }
  const gpu::Shape rest{over(c.rows, job.all ? 1 : kLook), CarefulRows::kThreads, 1,
                        sizeof(CarefulMemory<CarefulRows>)};
  if (c.temperatures) return cuda(gpu::launch(careful_rows<CarefulRows, true>, rest, c.stream, job));
  return cuda(gpu::launch(careful_rows<CarefulRows, false>, rest, c.stream, job));
}

}  // namespace
}  // namespace KD_LEVEL
}  // namespace kd

#define KD_API extern "C" __attribute__((visibility("default")))

KD_API int32_t kd_loss(kd_call *c) {
  using namespace kd::KD_LEVEL;
  if (!understood(c)) return KD_BAD_CALL;
  if (!c->rows) return KD_OK;
  const gpu::OnDevice here(c->device);
  Job job = make_job(*c);
  return run(job);
}

KD_API int64_t kd_workspace(const kd_call *c) {
  using namespace kd::KD_LEVEL;
  if (!understood(c)) return -KD_BAD_CALL;
  if (!c->rows) return 0;
  const gpu::OnDevice here(c->device);
  return workspace_on(make_job(*c));
}

KD_API int32_t kd_plan(const kd_call *c, const kd_figures *f, kd_geometry *g) {
  using namespace kd::KD_LEVEL;
  if (!understood(c)) return KD_BAD_CALL;
  return make_geometry(*c, make_job(*c).plan, *f, *g) ? KD_OK : KD_BAD_CALL;
}

KD_API void kd_tune(int32_t wide, int32_t stages) { kd::KD_LEVEL::tuning = {wide, stages}; }

KD_API int32_t kd_log_softmax(const kd_log_softmax_call *c) {
  using namespace kd::KD_LEVEL;
  if (!c->rows) return KD_OK;
  const gpu::OnDevice here(c->device);
  const SoftmaxJob job{*c, 1 / c->temperature};
  const gpu::Shape shape{c->rows, CarefulRows::kThreads, 1, CarefulRows::kWarps * 8};
  const int error = c->dtype == KD_F32 ? gpu::launch(log_softmax_rows<CarefulRows, 4>, shape, c->stream, job)
                                       : gpu::launch(log_softmax_rows<CarefulRows, 2>, shape, c->stream, job);
  return error ? KD_CUDA_ERROR + error : KD_OK;
}

KD_API int32_t kd_scale(const kd_scale_call *c) {
  using namespace kd::KD_LEVEL;
  if (!c->count) return KD_OK;
  const gpu::OnDevice here(c->device);
  const ScaleJob job{c->x, c->factor, c->count, c->dtype, c->factor_dtype};
  const int64_t blocks = over(c->count, CarefulRows::kThreads * kRun * 4), most = 1 << 16;
  const int error = gpu::launch(scale_all<CarefulRows>,
                                gpu::Shape{blocks < most ? blocks : most, CarefulRows::kThreads, 1, 0},
                                (void *)c->stream, job);
  return error ? KD_CUDA_ERROR + error : KD_OK;
}

KD_API int32_t kd_abi_version(void) { return KD_ABI_VERSION; }
KD_API int64_t kd_call_size(void) { return sizeof(kd_call); }
KD_API int64_t kd_log_softmax_call_size(void) { return sizeof(kd_log_softmax_call); }
KD_API int64_t kd_scale_call_size(void) { return sizeof(kd_scale_call); }
KD_API const char *kd_families(void) { return kd::KD_LEVEL::kNames; }
KD_API const char *kd_isa(void) { return KD_ARCHS; }  // what it was compiled for
KD_API int kd_openmp(void) { return 0; }
KD_API const char *kd_unavailable(int32_t device) {
  return gpu::unavailable(kd::KD_LEVEL::careful_rows<kd::KD_LEVEL::CarefulRows, false>, device);
}
KD_API const char *kd_error(int32_t status) {
  return status >= KD_CUDA_ERROR ? gpu::error_text(status - KD_CUDA_ERROR)
         : status == KD_BAD_CALL ? "the call is not one that these kernels take"
                                 : "";
}
#endif

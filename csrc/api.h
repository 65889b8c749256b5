// The whole ABI of the shared libraries, the CPU's and CUDA's: a struct for each capability, a few C
// functions. Python fills them through ctypes (kdkernels/backends/abi.py), so a field added here is added
// there, and kd_call_size() lets the loader refuse a library that was built from another version. Whoever
// gives a field or a function another meaning without changing a size counts KD_ABI_VERSION up, here and
// there.
#pragma once
#include <cstdint>

#define KD_ABI_VERSION 2

extern "C" {

enum kd_dtype : int32_t { KD_BF16 = 0, KD_F16 = 1, KD_F32 = 2, KD_F64 = 3 };
// CUDA's own errors are added to the last
enum kd_status : int32_t { KD_OK = 0, KD_BAD_LABEL = 1, KD_BAD_CALL = 2, KD_CUDA_ERROR = 1000 };

// rows are (outer, inner) pairs: row r starts at (r / inner) * stride[0] + (r % inner) * stride[1] elements,
// so that logits[:, :-1] needs no copy. Offsets are int64_t: 15k rows of 152k classes already pass 2^31.
struct kd_call {
  const void *student, *teacher;  // logits, last dimension contiguous
  void *grad;             // null: value only. In the student's dtype, whose storage it may be, or up to fp32
  const int64_t *labels;  // null without hard labels
  // per row, null: all 1. A row of weight 0 is not read; its gradient is zeroed
  const double *weight;
  const double *temperatures;  // per row, in place of `temperature`; null: that of all
  double *loss;                // per row: weight * (value_scale * D + hard_scale * CE)
  int64_t rows, inner, vocab;  // vocab: the classes that count
  int64_t grad_width;          // classes of a gradient row; those past vocab are zeroed
  int64_t student_stride[2], teacher_stride[2], grad_stride[2];
  int32_t student_dtype, teacher_dtype;
  int32_t family;   // of the divergence: index into kd_families()
  int32_t reverse;  // support, extreme: p and q exchanged
  int32_t threads;  // of the CPU
  int32_t fresh;    // the gradient is contiguous and lies in no other tensor: its tail may hold the workspace
  int32_t device;   // of CUDA
  int32_t grad_dtype;
  int32_t squared, reserved;  // with `temperatures`: a row's D is to be multiplied with T^2
  // the numbers of the family's member, as Form has them (kdkernels/form.py)
  double order, factor;
  double mix, teacher_part, student_part;
  double limit;            // k in the limit of high temperature
  double temperature;      // inf: the limit of T^2 D
  double value_scale;      // factor of D; with `temperatures` and `squared`, of T^2 D
  double grad_scale;       // factor of T dD/dz (of the limit's gradient at T = inf); with `temperatures` of
                           // dD/dz; with `squared` too, of T^2 dD/dz
  double hard_scale;       // factor of CE in the value
  double hard_grad_scale;  // factor of dCE/dz
  // of logits: softcap tanh(scale x / softcap), or scale x where it is 0
  double student_scale, student_softcap, teacher_scale, teacher_softcap;
  // CE is (1 - label_smoothing) CE + label_smoothing (lse - mean z) + z_loss lse^2
  double label_smoothing, z_loss;
  double *stats;             // per row: kd_stats numbers, null for none; nan for a row of weight 0
  int64_t bad_row;           // out: the row of a bad label (on a GPU such a row is nan instead)
  void *stream, *workspace;  // CUDA's stream; kd_workspace() bytes on the device, aligned to 16
  int64_t workspace_size;
};

// What a row of kd_call::stats holds: D without its factor, CE (nan without hard labels), the log-sum-exps of
// z/T and v/T, the entropies of their softmaxes, and the class of each that has the largest logit, the first
// of them.
enum kd_stat {
  KD_DIVERGENCE,
  KD_CROSS_ENTROPY,
  KD_STUDENT_LSE,
  KD_TEACHER_LSE,
  KD_STUDENT_ENTROPY,
  KD_TEACHER_ENTROPY,
  KD_STUDENT_TOP,
  KD_TEACHER_TOP,
  KD_STATS
};

// log softmax(x / T) over rows, and its gradient: out = log_softmax, or, given upstream, (upstream - softmax
// * sum upstream) / T.
struct kd_log_softmax_call {
  const void *logits, *upstream;
  void *out;
  int64_t rows, vocab;
  int64_t logits_stride, upstream_stride, out_stride;
  int32_t dtype;  // of logits, upstream and out
  int32_t threads, device, reserved;
  double temperature;
  void *stream;
};

// CUDA only: x *= factor, a number on the device.
struct kd_scale_call {
  void *x;
  const void *factor, *stream;
  int64_t count;
  int32_t dtype, factor_dtype, device, reserved;
};

// CUDA only: what a geometry depends on, and a geometry (csrc/cuda/plan.h).
struct kd_figures { int32_t capability, processors, shared_per_block, shared_per_processor; };
struct kd_geometry {
  int32_t kind, parts, tiles, stages, cluster, threads, shared, reserved;
  int64_t blocks;
};

int32_t kd_loss(kd_call *);
int32_t kd_log_softmax(const kd_log_softmax_call *);
int32_t kd_abi_version(void);  // KD_ABI_VERSION
int64_t kd_call_size(void);
int64_t kd_log_softmax_call_size(void);
const char *kd_families(void);  // comma-separated names, in the order of kd_call::family
const char *kd_isa(void);       // the instruction-set level in use
int kd_openmp(void);            // 1 when built with OpenMP

// CUDA only
int32_t kd_scale(const kd_scale_call *);
int64_t kd_scale_call_size(void);
int64_t kd_workspace(const kd_call *);  // bytes that kd_loss wants; negative: a status
int32_t kd_plan(const kd_call *, const kd_figures *, kd_geometry *);  // which kernel, without a device
// For measuring: clusters of blocks of 512 threads, and at most so many tiles of logits in shared memory (2
// or 3), in all calls from here on; 0: the plan's own choice.
void kd_tune(int32_t wide, int32_t stages);
const char *kd_unavailable(int32_t device);  // why the device cannot run these kernels; null when it can
const char *kd_error(int32_t status);
}

// The divergences by name, in the order of kd_call::family: kdkernels/form.py has the same list.
#pragma once
#include "api.h"

namespace kd {
namespace KD_LEVEL {

enum Divergence : int32_t {
  kKL,
  kCrossEntropy,
  kRenyi,
  kAlpha,
  kMixture,
  kTvd,
  kSupport,
  kExtreme,
  kLogitMatching,
  kMixedKL
};
constexpr const char *kNames =
    "kl,cross_entropy,renyi,alpha,mixture,tvd,support,extreme,logit_matching,mixed_kl";

}  // namespace KD_LEVEL
}  // namespace kd

// Which struct takes a row in fp64.
#pragma once
#include "mixture.h"
#include "moments.h"
#include "orders.h"
#include "power.h"

namespace kd {
namespace KD_LEVEL {

// use(row) with the one of a plan: row.measure(classes) gives D, row.gradient(z, v) T dD/dz of a class.
template <class F, class Crew, class Use>
KD_HD void with_careful(const Plan &plan, const Crew &crew, Use use) {
  const auto with = [&](auto row) { use(row); };
  switch (plan.careful) {
    case CarefulKind::kPower: return with(CarefulPower<F, Crew>(plan, crew));
    case CarefulKind::kMixture: return with(CarefulMixture<F, Crew>(plan, crew));
    case CarefulKind::kOrderZero: return with(CarefulOrderZero<F, Crew>(plan, crew));
    case CarefulKind::kOrderInf: return with(CarefulOrderInf<F, Crew>(plan, crew));
    default: return with(Moments<F, Crew>(plan, crew));
  }
}

}  // namespace KD_LEVEL
}  // namespace kd

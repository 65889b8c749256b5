// One row, the part that is the same on every device: the step of a class, the sums of a block, their merge,
// and the row's value and coefficients. A row passes through
//     reference -> sums -> close -> gradient        (the mixture family: sums twice)
// of which each stage takes a record and gives one: Reference -> FirstSums, Part -> Closed -> Coefficients.
//
// A block is any set of classes of the row with its own reference: top, the largest base logit, and ref, a
// difference o - b. Then e = e^{(b - top)/T}, y = ((o - b) - ref)/T, em = e expm1(y) and et = e expm1(tilt
// y). A row's gradient is linear in e, em and et, with coefficients that are known when the row is closed. So
// the exponentials are computed once and kept, or, where there is no room, computed again with the same bits.
// Here b and o are a class's logits; where they are distributions (plan.h), p_b and p_o would be meant.
//
// What a stage does differently for a family is in the family's struct: Plain, Tilted, Mixture. Of a class it
// has terms, take_lone (the limits where one side alone has the class), add (to the sums), hide (what a
// masked class must not leave behind) and keep; of a block's sums each(to, op), which calls op(field of to,
// own field) for all of them in one order, store and of_block; of a row put_R, may_refine, put_value and
// coefficients.
#pragma once
#include "close.h"
#include "entropy.h"
#include "hard.h"
#include "mixture.h"
#include "plain.h"
#include "step.h"
#include "tilted.h"

namespace kd {
namespace KD_LEVEL {

// use(family) with the one that sweeps the rows of a plan.
template <class Use> auto with_family(const Plan &plan, Use use) {
  switch (plan.family) {
    case FamilyKind::kTilted: return use(Tilted{});
    case FamilyKind::kMixture: return use(Mixture{});
    default: return use(Plain{});
  }
}

}  // namespace KD_LEVEL
}  // namespace kd

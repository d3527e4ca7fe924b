// Two splits of a sequence, merged in registers: what a consumer gets from the other one's partial it adds to
// its own half of the columns.
#pragma once

#include <cmath>

#include "numbers.cuh"
#include "ptx.cuh"
#include "work.cuh"

namespace mla {

// Whether it is this consumer's to merge its half: of two blocks that end with the sequence, one half is
// each's. But the second split's may go on with other sequences. Then its partial is the first thing that it
// does, and the first split's block, which always ends with the sequence, has little to wait for.
__device__ inline bool is_merged_here(const DecodeParams& params, const BlockPlan& plan,
                                      const SplitPlace& place, int consumer) {
    const PartPlan& of_second = params.parts[plan.part + 1 - place.index];
    const bool both_end = of_second.first_seq == of_second.last_seq;
    return place.index == (both_end ? consumer : 0);
}

// By what a row's normalized results count, and by what to scale their sum; the row's log-sum-exp.
struct PairWeights {
    float mine, other, inverse, lse;

    __device__ PairWeights(float my_lse, float other_lse) {
        const float max = fmaxf(my_lse, other_lse), offset = max == -INFINITY ? 0.f : max;
        mine = ptx::exp2_approx((my_lse - offset) * kLog2E);
        other = ptx::exp2_approx((other_lse - offset) * kLog2E);
        const float sum = mine + other;  // 0 where neither saw a key
        inverse = ptx::inverse_or_zero(sum);
        lse = sum == 0.f ? INFINITY : max + __logf(sum);
    }
};

}  // namespace mla

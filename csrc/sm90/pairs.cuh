// Two splits of a sequence, merged in registers: what a consumer gets from the other one's partial it adds to
// its own half of the columns.
#pragma once

#include <cmath>

#include "numbers.cuh"
#include "ptx.cuh"
#include "work.cuh"

namespace mla {

// Whether the split is one of two, and it is this consumer's to merge its half: of two blocks that end with
// the sequence, one half is each's. But the second split's may go on with other sequences. Then its partial
// is the first thing that it does, and the first split's block, which always ends with the sequence, has
// little to wait for. Asked before the split's pages, for the answer takes a trip to memory.
__device__ inline bool is_merged_here(const DecodeParams& params, const BlockPlan& plan,
                                      const SplitPlace& place, int consumer) {
    if (place.num_splits != 2) return false;
    const PartPlan& of_second = params.parts[plan.part + 1 - place.index];
    const bool both_end = of_second.first_seq == of_second.last_seq;
    return place.index == (both_end ? consumer : 0);
}

// By what a row's two partial results are to be multiplied; the row's log-sum-exp.
struct PairWeights {
    float mine, other, lse;

    __device__ PairWeights(const WeightSum& of_mine, const WeightSum& of_other) {
        const float max = fmaxf(of_mine.max, of_other.max), offset = max == -INFINITY ? 0.f : max;
        mine = ptx::exp2_approx(of_mine.max - offset);
        other = ptx::exp2_approx(of_other.max - offset);
        const WeightSum both(max, of_mine.sum * mine + of_other.sum * other);  // 0 where neither saw a key
        mine *= both.inverse();
        other *= both.inverse();
        lse = both.log_sum_exp();
    }
};

}  // namespace mla

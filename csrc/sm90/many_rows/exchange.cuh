// Two splits of a sequence, each all that its part has to do: their blocks finish together, and each keeps
// one half of the output in registers and gets only that half from the other.
#pragma once

#include <cmath>

#include "../arrivals.cuh"
#include "../merge.cuh"
#include "epilogue.cuh"
#include "storage.cuh"

namespace mla::many_rows {

__device__ inline bool is_exchange(const DecodeParams& params, const PartPlan& plan,
                                   const SplitPlace& place) {
    if (place.num_splits != 2 || plan.first_seq != plan.last_seq) return false;
    const int other = part_of_block(params) + (place.index == 0 ? 1 : -1);
    return other >= 0 && other < params.num_parts &&
           params.parts[other].first_seq == params.parts[other].last_seq;
}

// Adds the other split's half to `output`, which was not scaled yet; returns by what to scale the sum.
__device__ inline float2 merge_exchanged(const DecodeParams& params, const RowTile& tile, const Split& split,
                                         const SplitPlace& place, int consumer, float2 scale,
                                         float (&output)[128]) {
    const Partial mine(params, tile, place, place.index), other(params, tile, place, 1 - place.index);
    const int lane = threadIdx.x % 32, rows = split.valid_rows(params, tile);
    float scales[2] = {scale.x, scale.y};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int octet = threadIdx.x % kWarpgroup / 32 * 2 + h, row = octet * kOctetRows + lane / 4;
        if (row >= rows) continue;
        const int stride = other.group_stride(octet) / 2;
        const float my_lse = __ldcg(mine.lse + row), other_lse = __ldcg(other.lse + row);
        const auto* at = reinterpret_cast<const float2*>(other.group(octet, consumer * kGroups / 2)) + lane;
        const float max = fmaxf(my_lse, other_lse), offset = max == -INFINITY ? 0.f : max;
        const float my_weight = ptx::exp2_approx((my_lse - offset) * kLog2E);
        const float other_weight = ptx::exp2_approx((other_lse - offset) * kLog2E);
        const float sum = my_weight + other_weight, factor = my_weight * scales[h];
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i) {
            const float2 value = __ldcg(at + i * stride);
            output[4 * i + 2 * h] = output[4 * i + 2 * h] * factor + value.x * other_weight;
            output[4 * i + 2 * h + 1] = output[4 * i + 2 * h + 1] * factor + value.y * other_weight;
        }
        scales[h] = sum == 0.f ? 0.f : ptx::reciprocal_approx(sum);
        if (consumer == kLeft && lane % 4 == 0)
            *lse_of(params, split.seq, row_of(params, tile, split, row)) =
                sum == 0.f ? INFINITY : max + __logf(sum);
    }
    return make_float2(scales[0], scales[1]);
}

}  // namespace mla::many_rows

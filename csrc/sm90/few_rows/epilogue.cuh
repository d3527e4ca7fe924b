// A split's end: the consumers' outputs become one, each finishes its half of the columns, and it goes to
// memory as a float32 partial for the merge or as final rows in q's dtype.
//
// A half of the output is four tiles of 64 columns x kRows query rows as wgmma leaves them: element 4 i + 2 h
// + e is of column 16 warp + lane / 4 + 8 h and of row 8 i + 2 (lane % 4) + e. So is the softmax's: see
// there.
#pragma once

#include "../arrivals.cuh"
#include "../pairs.cuh"
#include "../partial.cuh"
#include "../rows.cuh"
#include "softmax.cuh"
#include "storage.cuh"

namespace mla::few_rows {

template <int kRows>
using HalfOutput = float[kTilesHalfV][kRows / 2];

// Waits for both consumers, by an mbarrier, for racecheck does not follow a named barrier of both.
template <int kRows>
__device__ inline void meet(Storage<kRows>& shared, uint32_t& parity) {
    ptx::barrier_arrive(&shared.meeting);
    ptx::barrier_wait(&shared.meeting, parity);
    parity ^= 1;
}

// A query row over both consumers: the larger of their maxima, and the sum of all weights relative to it.
template <int kRows>
struct RowTotal {
    float max;
    float weight[kConsumers];  // by which a consumer's weights count
    float sum = 0.f;

    __device__ RowTotal(const Storage<kRows>& shared, int row) {
        const float2 of_consumer = *reinterpret_cast<const float2*>(shared.max[row]);
        max = fmaxf(of_consumer.x, of_consumer.y);
        const float offset = max == -INFINITY ? 0.f : max;
        weight[0] = ptx::exp2_approx(of_consumer.x - offset);
        weight[1] = ptx::exp2_approx(of_consumer.y - offset);
#pragma unroll
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            const float4 of_warp = *reinterpret_cast<const float4*>(shared.sum[consumer][row]);
            sum += (of_warp.x + of_warp.y + (of_warp.z + of_warp.w)) * weight[consumer];
        }
    }
    __device__ float inverse() const { return ptx::inverse_or_zero(sum); }
    __device__ float log_sum_exp(float empty) const { return sum == 0.f ? empty : max * kLn2 + __logf(sum); }
};

// By what a thread scales, for each of its rows, its consumer's output and the other's. A lane works out one
// row, and the others get it from there.
template <int kRows>
struct Normalizer {
    RowTotal<kRows> total;  // of the lane's row
    float of_own[kRows / 4];
    float of_other[kRows / 4];

    __device__ Normalizer(const Storage<kRows>& shared, int consumer) : total(shared, threadIdx.x % kRows) {
        const float inverse = total.inverse();
        const float own = inverse * (consumer == 0 ? total.weight[0] : total.weight[1]);
        const float other = inverse * (consumer == 0 ? total.weight[1] : total.weight[0]);
#pragma unroll
        for (int v = 0; v < kRows / 4; ++v) {
            of_own[v] = __shfl_sync(~0u, own, row_of_value(v));
            of_other[v] = __shfl_sync(~0u, other, row_of_value(v));
        }
    }
};

// Adds the other consumer's output in this one's columns to `own`, and hands over this one's in the other's.
template <int kRows>
__device__ inline void join_halves(Storage<kRows>& shared, const Normalizer<kRows>& normalizer, int consumer,
                                   uint32_t& meeting_parity, HalfOutput<kRows>& own,
                                   const HalfOutput<kRows>& others) {
    const int thread = threadIdx.x % kWarpgroup;
    auto* to_other = reinterpret_cast<float4*>(shared.scratch[consumer]) + thread;
    const auto* from_other = reinterpret_cast<const float4*>(shared.scratch[1 - consumer]) + thread;
#pragma unroll
    for (int i = 0; i < kRows / 2; i += kScratchRows / 2) {
        if (i > 0) meet(shared, meeting_parity);  // what was handed over before has been read
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t) {
            const float* v = &others[t][i];
            to_other[2 * t * kWarpgroup] = make_float4(v[0], v[1], v[2], v[3]);
            to_other[(2 * t + 1) * kWarpgroup] = make_float4(v[4], v[5], v[6], v[7]);
        }
        meet(shared, meeting_parity);
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t) {
            const float4 low = from_other[2 * t * kWarpgroup], high = from_other[(2 * t + 1) * kWarpgroup];
            const float other[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int value = (i + j) / 4 * 2 + j % 2;
                own[t][i + j] =
                    own[t][i + j] * normalizer.of_own[value] + other[j] * normalizer.of_other[value];
            }
        }
    }
}

// Calls `work` with the places in a partial of this consumer's values: where, in which tile, which one there.
template <int kRows, typename Work>
__device__ inline void for_each_value(const Partial& partial, int rows, int consumer, Work&& work) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int first_group = (consumer * kColumnsHalfV + 16 * warp) / kGroupColumns;
#pragma unroll
    for (int octet = 0; octet < kRows / kOctetRows; ++octet) {
        if (octet * kOctetRows >= rows) break;
        const int row = lane % 4 * 2, rows_left = rows - octet * kOctetRows - row;
        const int stride = partial.group_stride(octet);
        float* group = partial.group(octet, first_group) + row * kGroupColumns + lane / 4;
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (rows_left > 0) work(group, t, 4 * octet + 2 * h);
                if (rows_left > 1) work(group + kGroupColumns, t, 4 * octet + 2 * h + 1);
                group = ptx::further(group, h == 0 ? stride : (kTileColumns / kGroupColumns - 1) * stride);
            }
    }
}

template <int kRows>
__device__ inline void store_partial(const Partial& partial, int rows, const HalfOutput<kRows>& own,
                                     int consumer) {
    for_each_value<kRows>(partial, rows, consumer, [&](float* at, int t, int i) { *at = own[t][i]; });
}

// Adds the other one of two splits to `own`. A lane weighs one row, and the others get that from there.
template <int kRows>
__device__ inline void add_other_split(const DecodeParams& params, const RowTile& tile, const Split& split,
                                       const SplitPlace& place, const RowTotal<kRows>& total, int consumer,
                                       HalfOutput<kRows>& own) {
    const Partial other(params, tile, place.slot_of(1 - place.index));
    const int rows = split.valid_rows(params, tile), row = threadIdx.x % kRows;
    const PairWeights weights(total.log_sum_exp(-INFINITY), row < rows ? __ldcg(other.lse + row) : -INFINITY);
    if (threadIdx.x < rows) *lse_of(params, split.query, row_of(params, tile, split, row)) = weights.lse;
    float of_own[kRows / 4], of_other[kRows / 4];
#pragma unroll
    for (int v = 0; v < kRows / 4; ++v) {
        of_own[v] = __shfl_sync(~0u, weights.mine * weights.inverse, row_of_value(v));
        of_other[v] = __shfl_sync(~0u, weights.other * weights.inverse, row_of_value(v));
    }
    for_each_value<kRows>(other, rows, consumer, [&](const float* at, int t, int i) {
        const int value = i / 4 * 2 + i % 2;
        own[t][i] = own[t][i] * of_own[value] + __ldcg(at) * of_other[value];
    });
}

template <typename T, int kRows>
__device__ inline void stage_rows(const HalfOutput<kRows>& own, uint8_t* staging) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows / 2; i += 8) {
        const int row = 2 * i + lane / 16 * 8 + lane % 8;
        uint8_t* place = staging + row * kSegmentBytes + swizzled((16 * warp + lane / 8 % 2 * 8) * 2, row);
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t)
            ptx::store_matrices_transposed(place + t * kRowBytes, pack_matrices<T>(&own[t][i]));
    }
}

// A thread a row: its log-sum-exp, to a partial's, or where that is null the final one.
template <int kRows>
__device__ inline void store_lse(const DecodeParams& params, const RowTotal<kRows>& total,
                                 const RowTile& tile, const Split& split, float* of_partial) {
    if (threadIdx.x >= kRows) return;
    const Row row = row_of(params, tile, split, threadIdx.x);
    if (!row.valid) return;
    if (of_partial) {
        of_partial[threadIdx.x] = total.log_sum_exp(-INFINITY);
    } else {
        *lse_of(params, split.query, row) = total.log_sum_exp(INFINITY);
    }
}

// Final rows of a consumer's half of the output. `staging`: what the other one handed over.
template <typename T, int kRows>
__device__ inline void store_rows(const DecodeParams& params, const RowTile& tile, const Split& split,
                                  const HalfOutput<kRows>& own, int consumer, uint8_t* staging) {
    sync_warpgroup(consumer);  // it has been read
    stage_rows<T, kRows>(own, staging);
    sync_warpgroup(consumer);
    copy_rows<T>(params, tile, split, staging, consumer * kColumnsHalfV);
}

// Stores a consumer's half of a split's result.
template <typename T, int kRows>
__device__ inline void finish_split(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                    const Split& split, int consumer, uint32_t& meeting_parity,
                                    const OnlineSoftmax<kRows>& softmax, HalfOutput<kRows>& own,
                                    const HalfOutput<kRows>& others) {
    softmax.publish(shared.sum[consumer], shared.max, consumer);
    meet(shared, meeting_parity);  // also: what was staged for the split before has been copied
    const SplitPlace place(params, shared.plan, split);
    const Normalizer<kRows> normalizer(shared, consumer);
    const Partial partial(params, tile, place.slot_of(place.index));
    store_lse<kRows>(params, normalizer.total, tile, split, place.is_partial() ? partial.lse : nullptr);
    join_halves<kRows>(shared, normalizer, consumer, meeting_parity, own, others);
    uint8_t* staging = shared.scratch[1 - consumer];
    const bool is_joined = place.num_splits == 2 && is_merged_here(params, shared.plan, place, consumer);
    const bool is_mine = is_joined || !place.is_partial();
    if (!is_mine) store_partial<kRows>(partial, split.valid_rows(params, tile), own, consumer);
    if (place.is_partial()) arrive(params, shared.plan, place, consumer);
    if (is_joined) {
        wait_for_all(params, shared.plan, shared.phases, split, place, consumer);
        add_other_split<kRows>(params, tile, split, place, normalizer.total, consumer, own);
    }
    if (is_mine) store_rows<T, kRows>(params, tile, split, own, consumer, staging);
}

}  // namespace mla::few_rows

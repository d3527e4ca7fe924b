// A split's end: each consumer finishes its half of the columns, and it goes to memory as a float32 partial
// for the merge or as final rows in q's dtype.
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

// What a consumer keeps from one split to the next.
struct ConsumerState {
    RingPosition<kStages> stage;  // of the next page
    uint32_t query_parity = 0;
    uint32_t meeting_parity = 0;
};

template <int kRows>
__device__ inline void rescale_output(HalfOutput<kRows>& output, const float (&rescale)[kRows / 4]) {
#pragma unroll
    for (int t = 0; t < kTilesHalfV; ++t)
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) output[t][i] *= rescale[i / 4 * 2 + i % 2];
}

// A query row's weights over all pages of a split or chunk.
template <int kRows>
__device__ inline WeightSum total_of(const Storage<kRows>& shared, int last_stage, int meeting, int row) {
    WeightSum total(shared.max[last_stage][row], 0.f);
#pragma unroll
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        const float4 of_warp = *reinterpret_cast<const float4*>(shared.sum[meeting][consumer][row]);
        total.sum += of_warp.x + of_warp.y + (of_warp.z + of_warp.w);
    }
    if (total.sum == 0.f) total.max = -INFINITY;  // no key was seen, perhaps because there was no page
    return total;
}

// Calls `work` with the places in a partial of this consumer's values: where, in which tile, which one there.
template <int kRows, typename Partial, typename Work>
__device__ inline void for_each_value(const Partial& partial, int rows, int consumer, Work&& work) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int first_group = (consumer * kColumnsHalfV + 16 * warp) / kGroupColumns;
#pragma unroll
    for (int octet = 0; octet < kRows / kOctetRows; ++octet) {
        if (octet * kOctetRows >= rows) break;
        const int row = lane % 4 * 2, rows_left = rows - octet * kOctetRows - row;
        float* group = partial.group(octet, first_group) + row * kGroupColumns + lane / 4;
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (rows_left > 0) work(group, t, 4 * octet + 2 * h);
                if (rows_left > 1) work(group + kGroupColumns, t, 4 * octet + 2 * h + 1);
                group = partial.further(group, octet, h == 0 ? 1 : kTileColumns / kGroupColumns - 1);
            }
    }
}

template <int kRows>
__device__ inline void store_partial(const Partial& partial, int rows, const HalfOutput<kRows>& output,
                                     int consumer) {
    for_each_value<kRows>(partial, rows, consumer, [&](float* at, int t, int i) { *at = output[t][i]; });
}

// Adds the other one of two splits to `output`. A lane weighs one row, and the others get that from there.
template <int kRows>
__device__ inline void add_other_split(const DecodeParams& params, const RowTile& tile, const Split& split,
                                       const SplitPlace& place, const WeightSum& total, int consumer,
                                       HalfOutput<kRows>& output) {
    const Partial other(params, tile, place.slot_of(1 - place.index));
    const int rows = split.valid_rows(params, tile), row = threadIdx.x % kRows;
    const PairWeights weights(total, row < rows ? WeightSum(__ldcg(other.weight_sums + row)) : WeightSum());
    if (threadIdx.x < rows) *lse_of(params, split.query, row_of(params, tile, split, row)) = weights.lse;
    float of_mine[kRows / 4], of_other[kRows / 4];
#pragma unroll
    for (int v = 0; v < kRows / 4; ++v) {
        of_mine[v] = __shfl_sync(~0u, weights.mine, row_of_value(v));
        of_other[v] = __shfl_sync(~0u, weights.other, row_of_value(v));
    }
    for_each_value<kRows>(other, rows, consumer, [&](const float* at, int t, int i) {
        const int value = i / 4 * 2 + i % 2;
        output[t][i] = output[t][i] * of_mine[value] + __ldcg(at) * of_other[value];
    });
}

template <typename T, int kRows>
__device__ inline void stage_rows(const HalfOutput<kRows>& output, uint8_t* staging) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows / 2; i += 8) {
        const int row = 2 * i + lane / 16 * 8 + lane % 8;
        uint8_t* place = staging + row * kSegmentBytes + swizzled((16 * warp + lane / 8 % 2 * 8) * 2, row);
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t)
            ptx::store_matrices_transposed(place + t * kRowBytes, pack_matrices<T>(&output[t][i]));
    }
}

// A thread of the first consumer a row: its weights, to a partial's, or where that is null their log-sum-exp.
template <int kRows>
__device__ inline void store_weight_sums(const DecodeParams& params, const WeightSum& total,
                                         const RowTile& tile, const Split& split, float2* of_partial) {
    if (threadIdx.x >= kRows) return;
    const Row row = row_of(params, tile, split, threadIdx.x);
    if (!row.valid) return;
    store_weights_of_row(params, split, row, threadIdx.x, total, of_partial);
}

// Final rows of a consumer's half of the output.
template <typename T, int kRows>
__device__ inline void store_rows(const DecodeParams& params, const RowTile& tile, const Split& split,
                                  const HalfOutput<kRows>& output, int consumer, uint8_t* staging) {
    sync_warpgroup(consumer);  // what was staged before has been copied
    stage_rows<T, kRows>(output, staging);
    sync_warpgroup(consumer);
    copy_rows<T>(params, tile, split, staging, consumer * kColumnsHalfV);
}

// Stores a consumer's half of a split's result.
template <typename T, int kRows>
__device__ inline void finish_split(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                    const Split& split, const SplitPlace& place, bool is_joined, int consumer,
                                    ConsumerState& state, const OnlineSoftmax<T, kRows>& softmax,
                                    HalfOutput<kRows>& output) {
    const Partial partial(params, tile, place.slot_of(place.index));
    const bool is_mine = is_joined || !place.is_partial();
    softmax.publish(shared.sum[state.meeting_parity][consumer]);
    ptx::barrier_arrive(&shared.meeting);
    if (!is_mine) store_partial<kRows>(partial, split.valid_rows(params, tile), output, consumer);
    ptx::barrier_wait(&shared.meeting, state.meeting_parity);
    const WeightSum total = total_of(shared, 1 - state.stage.slot, state.meeting_parity, threadIdx.x % kRows);
    state.meeting_parity ^= 1;
    store_weight_sums<kRows>(params, total, tile, split, place.is_partial() ? partial.weight_sums : nullptr);
    if (place.is_partial()) arrive(params, shared.plan, place, consumer);
    if (is_joined) {
        wait_for_all(params, shared.plan, shared.phases, split, place, consumer);
        add_other_split<kRows>(params, tile, split, place, total, consumer, output);
    }
    if (!is_mine) return;
    if (!is_joined) {
        float inverse[kRows / 4];
#pragma unroll
        for (int v = 0; v < kRows / 4; ++v) inverse[v] = __shfl_sync(~0u, total.inverse(), row_of_value(v));
        rescale_output<kRows>(output, inverse);
    }
    store_rows<T, kRows>(params, tile, split, output, consumer, shared.staging[consumer]);
}

}  // namespace mla::few_rows

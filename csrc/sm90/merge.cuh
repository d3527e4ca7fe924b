// The merge of a sequence's splits, by the blocks that worked on them: out = sum_i w_i out_i / sum_i w_i s_i
// with w_i = exp2(max_i), relative to the largest, and s_i the sum of a split's weights.
//
// A warpgroup that has written its half of a partial says so (arrivals.cuh) and works on. At its end it waits
// until all splits of its last sequence are written, and merges its share of their rows: all SMs merge, and
// no second kernel has to be launched.
#pragma once

#include <cmath>

#include "arrivals.cuh"
#include "numbers.cuh"
#include "partial.cuh"
#include "rows.cuh"

namespace mla {

// Some splits of a row merged, in a lane's columns.
template <int kVectors>
struct MergeState {
    float4 out[kVectors] = {};
    WeightSum weights;

    // Makes all relative to a maximum that is no less than `other`.
    __device__ void raise_to(float other) {
        const float before = weights.max;
        weights.max = fmaxf(before, other);
        if (weights.max == -INFINITY) return;  // nothing is summed up
        const float keep = ptx::exp2_approx(before - weights.max);
        weights.sum *= keep;
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            out[v] = make_float4(out[v].x * keep, out[v].y * keep, out[v].z * keep, out[v].w * keep);
    }
    // Adds other splits. Their maximum may be no more than this one.
    __device__ void add(const WeightSum& other, const float4 (&value)[kVectors]) {
        if (other.sum == 0.f) return;  // saw no key: its values may be anything
        const float take = ptx::exp2_approx(other.max - weights.max);
        weights.sum += other.sum * take;
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            out[v] = make_float4(out[v].x + value[v].x * take, out[v].y + value[v].y * take,
                                 out[v].z + value[v].z * take, out[v].w + value[v].w * take);
    }
};

// A half-warp walks a group of 8 columns: lane 2 r + i has columns 4 i to 4 i + 3 of the octet's row r. Its
// vectors are kVectors groups, each second one from `group` on.
template <int kVectors>
struct Merger {
    static constexpr int kHalf = 16;

    const DecodeParams& params;
    const Partial& first;  // of split 0
    int octet, group;

    __device__ Merger(const DecodeParams& params, const Partial& first, int octet, int group)
        : params(params), first(first), octet(octet), group(group) {}

    // Adds every step-th split from `begin` on, kUnroll of them at a time: their loads are under way
    // together.
    template <int kUnroll>
    __device__ void add_splits(MergeState<kVectors>& state, int begin, int end, int step) const {
        const int lane = threadIdx.x % kHalf, group_stride = first.group_stride(octet);
        // Past a cut octet's end, its last row again.
        const int row = min(lane / 2, first.octet_rows(octet) - 1);
        const float2* weights_row =
            first.weight_sums + octet * kOctetRows + row + begin * params.partial_rows;
        const float* out = first.group(octet, group) + row * kGroupColumns + lane % 2 * 4 +
                           begin * params.partial_rows * kHeadDimV;
        const int64_t stride = step * params.partial_rows;
#pragma unroll 1
        for (; begin < end; begin += kUnroll * step) {
            float4 value[kUnroll][kVectors];
            WeightSum weights[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                if (begin + i * step < end) {
                    weights[i] = WeightSum(__ldcg(weights_row));
#pragma unroll
                    for (int v = 0; v < kVectors; ++v)
                        value[i][v] = __ldcg(reinterpret_cast<const float4*>(out + 2 * v * group_stride));
                }
                weights_row += stride;
                out += stride * kHeadDimV;
            }
            float max = weights[0].max;
#pragma unroll
            for (int i = 1; i < kUnroll; ++i) max = fmaxf(max, weights[i].max);
            state.raise_to(max);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) state.add(weights[i], value[i]);
        }
    }

    template <typename T>
    __device__ void store(const RowTile& tile, const Split& split, const MergeState<kVectors>& state) const {
        store_merged<T>(params, tile, split, octet, group, state.out, state.weights);
    }
};

// Where a consumer's warps put together what they have merged of the same item, all but the first warp.
template <int kVectors>
using MergeScratch = MergeState<kVectors>[kWarps - 1][32];

// Adds up what `warps` neighbouring ones have merged, in the first of them; whether this is that. All of the
// consumer's warps pass here once.
template <int kVectors>
__device__ inline bool gather(MergeState<kVectors>& state, int warps, int consumer,
                              MergeScratch<kVectors>& scratch) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    if (warp > 0) scratch[warp - 1][lane] = state;
    sync_warpgroup(consumer);
    if (warp % warps != 0) return false;
#pragma unroll 1
    for (int i = 1; i < warps; ++i) {
        const MergeState<kVectors>& other = scratch[warp + i - 1][lane];
        state.raise_to(other.weights.max);
        state.add(other.weights, other.out);
    }
    return true;
}

__device__ inline float4 shuffle_xor(float4 value, int mask) {
    return make_float4(__shfl_xor_sync(~0u, value.x, mask), __shfl_xor_sync(~0u, value.y, mask),
                       __shfl_xor_sync(~0u, value.z, mask), __shfl_xor_sync(~0u, value.w, mask));
}

// How a warp's two halves share an item.
enum Halves { kColumnsInTurns, kSplitsInTurns };

// The first half-warp gets what the second has merged, too.
__device__ inline void add_second_half(MergeState<1>& state) {
    const float4 out[] = {shuffle_xor(state.out[0], 16)};
    const WeightSum weights(__shfl_xor_sync(~0u, state.weights.max, 16),
                            __shfl_xor_sync(~0u, state.weights.sum, 16));
    state.raise_to(weights.max);
    state.add(weights, out);
}

// A consumer's share of a merge, in items of 8 rows x kVectors groups of columns for each half-warp, or for
// both. A warp merges one; where there is one item or two, four or two warps take the splits of each in
// turns. `place` says of which partials, `part` which share.
template <typename T, int kVectors, Halves kHalves>
__device__ inline void merge_share(const DecodeParams& params, const RowTile& tile, const Split& split,
                                   const SplitPlace& place, const SplitPlace& part, int octets, int consumer,
                                   MergeScratch<kVectors>& scratch) {
    constexpr int kLoads = 8;  // under way together
    constexpr int kColumnHalves = kHalves == kColumnsInTurns ? 2 : 1, kSplitHalves = 3 - kColumnHalves;
    constexpr int kItems = kGroups / (kColumnHalves * kVectors);  // in an octet
    const int warp = threadIdx.x % kWarpgroup / 32, half = threadIdx.x % 32 / 16;
    const int ranks = part.num_splits * kConsumers, rank = part.index * kConsumers + consumer;
    const int items = octets * kItems;
    const int warps = rank + ranks >= items ? 4 : rank + 2 * ranks >= items ? 2 : 1;  // to an item
    const Partial first(params, tile, place.first_slot);
#pragma unroll 1
    for (int item = rank + warp / warps * ranks; item < items; item += kWarps / warps * ranks) {
        const int group = item % kItems * kColumnHalves * kVectors + (kColumnHalves > 1 ? half : 0);
        const Merger<kVectors> merger(params, first, item / kItems, group);
        MergeState<kVectors> state;
        const int first_split = warp % warps * kSplitHalves + (kSplitHalves > 1 ? half : 0);
        merger.template add_splits<kLoads / kVectors>(state, first_split, place.num_splits,
                                                      warps * kSplitHalves);
        if constexpr (kSplitHalves > 1) add_second_half(state);
        if (warps > 1 && !gather(state, warps, consumer, scratch)) return;
        if (kSplitHalves == 1 || half == 0) merger.template store<T>(tile, split, state);
    }
}

// Merges the part's last sequence where others work on it, too, and it is no pair, which pairs.cuh merges.
// The first one, where it is another, is left to the parts that end with that one. Large items, of
// kLargeVectors groups a half-warp, as long as each consumer has one; else small ones, which a warp's halves
// share as kSmallHalves says.
template <typename T, int kLargeVectors, Halves kSmallHalves, typename Storage>
__device__ inline void merge_splits(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                    int consumer) {
    const BlockPlan& plan = shared.plan;
    const int seq = ptx::uniform(plan.last_seq);
    if (seq < max(plan.first_seq, 0) || seq >= params.batch) return;  // an idle part
    const Split split{.seq = seq, .query = Query(params, seq)};       // its pages do not matter any more
    if (tile.first_token >= split.query.length) return;
    const SplitPlace place(params, plan, split);
    if (place.num_splits <= 2) return;
    SplitPlace part = place;
    const PartPlan& of_last = params.parts[plan.part + place.num_splits - 1 - place.index];
    if (of_last.first_seq != of_last.last_seq) --part.num_splits;
    sync_warpgroup(consumer);  // what the last split left in the scratch has been read
    wait_for_all(params, plan, shared.phases, split, place, consumer);
    const int octets = (split.valid_rows(params, tile) + kOctetRows - 1) / kOctetRows;
    if (2 * kConsumers * part.num_splits * kLargeVectors <= octets * kGroups) {
        merge_share<T, kLargeVectors, kColumnsInTurns>(
            params, tile, split, place, part, octets, consumer,
            shared.template merge_scratch<kLargeVectors>(consumer));
    } else {
        merge_share<T, 1, kSmallHalves>(params, tile, split, place, part, octets, consumer,
                                        shared.template merge_scratch<1>(consumer));
    }
}

}  // namespace mla

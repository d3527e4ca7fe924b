// A split's result from registers to memory: a float32 partial for the merge, or final rows in q's dtype.
//
// Partials go straight from registers. Final rows would be stored in pieces of 16 bytes: a warpgroup lays
// them out in the V tiles of its last page, which it still holds, and stores whole lines from there.
#pragma once

#include "../pairs.cuh"
#include "../partial.cuh"
#include "../rows.cuh"
#include "softmax.cuh"
#include "storage.cuh"

namespace mla::many_rows {

// Index of the thread's first row in the tile; its second is 8 further.
__device__ inline int first_row_of_thread() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

template <typename T>
__device__ inline void stage_rows(const float (&output)[128], uint8_t* staging) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int row = 16 * warp + lane % 16, first = swizzled(lane / 16 * 16, row);
    uint8_t* segment = staging + row * kSegmentBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint8_t* place = ptx::further(segment, first ^ i * 32);
#pragma unroll
        for (int line = 0; line < 4; ++line)
            ptx::store_matrices(place + line * kRowBytes, pack_matrices<T>(&output[32 * line + 8 * i]));
    }
}

__device__ inline void scale_output(float (&output)[128], float2 scale) {
#pragma unroll
    for (int i = 0; i < 128; ++i) output[i] *= i / 2 % 2 == 0 ? scale.x : scale.y;
}

// Calls `work` with the places in a partial of this consumer's half, two neighbouring values at a time: in
// which of the thread's two rows, where, and where they are in its output.
template <typename Partial, typename Work>
__device__ inline void for_each_pair(const Partial& partial, int rows, int consumer, Work&& work) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int octet = threadIdx.x % kWarpgroup / 32 * 2 + h;
        if (octet * kOctetRows + lane / 4 >= rows) continue;
        auto* at = reinterpret_cast<float2*>(partial.group(octet, consumer * kGroups / 2)) + lane;
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i, at = partial.further(at, octet, 1)) work(h, at, 4 * i + 2 * h);
    }
}

// Final rows of a consumer's half of the output. `v_tiles`: its half of the last page, which nothing reads
// any more.
template <typename T>
__device__ inline void store_rows(const DecodeParams& params, const RowTile& tile, const Split& split,
                                  const float (&output)[128], int consumer, uint8_t* v_tiles) {
    sync_warpgroup(consumer);  // every warp's products with the tiles are done
    stage_rows<T>(output, v_tiles);
    sync_warpgroup(consumer);
    copy_rows<T>(params, tile, split, v_tiles, consumer * kColumnsHalfV);
    ptx::fence_async_proxy();  // these reads come before the copy engine's next writes
    // And before this warpgroup's: the loader sees to it, in two steps, which racecheck does not follow.
    sync_warpgroup(consumer);
}

// Rows of a sequence without keys.
template <typename T>
__device__ inline void store_zeros(const DecodeParams& params, const RowTile& tile, const Split& split,
                                   int consumer) {
    const int thread = threadIdx.x % kWarpgroup;
#pragma unroll 1
    for (int row = 0; row < split.valid_rows(params, tile); ++row)
        reinterpret_cast<uint32_t*>(out_of<T>(params, split.query, row_of(params, tile, split, row)) +
                                    consumer * kColumnsHalfV)[thread] = 0;
}

// One thread of each quad writes its rows' weights, to a partial's, or where that is null their log-sum-exp.
__device__ inline void store_weight_sums(const DecodeParams& params, const RowTile& tile, const Split& split,
                                         const SplitEnd& end, float2* of_partial) {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
        const int row_of_tile = first_row_of_thread() + 8 * h;
        const Row row = row_of(params, tile, split, row_of_tile);
        if (!row.valid) continue;
        // Member by member: a choice between the two as they are would put them into local memory.
        const WeightSum weights(h == 0 ? end.rows[0].max : end.rows[1].max,
                                h == 0 ? end.rows[0].sum : end.rows[1].sum);
        store_weights_of_row(params, split, row, row_of_tile, weights, of_partial);
    }
}

// Adds the other split's half to `output`.
__device__ inline void add_other_split(const DecodeParams& params, const RowTile& tile, const Split& split,
                                       const SplitPlace& place, const SplitEnd& end, int consumer,
                                       float (&output)[128]) {
    const Partial other(params, tile, place.slot_of(1 - place.index));
    const int rows = split.valid_rows(params, tile);
    float of_mine[2], of_other[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = first_row_of_thread() + 8 * h;
        if (row >= rows) continue;
        const PairWeights weights(end.rows[h], WeightSum(__ldcg(other.weight_sums + row)));
        of_mine[h] = weights.mine;
        of_other[h] = weights.other;
        if (consumer == kLeft && threadIdx.x % 4 == 0)
            *lse_of(params, split.query, row_of(params, tile, split, row)) = weights.lse;
    }
    for_each_pair(other, rows, consumer, [&](int h, const float2* at, int i) {
        const float2 value = __ldcg(at);
        output[i] = output[i] * of_mine[h] + value.x * of_other[h];
        output[i + 1] = output[i + 1] * of_mine[h] + value.y * of_other[h];
    });
}

}  // namespace mla::many_rows

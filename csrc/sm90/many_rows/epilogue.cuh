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
__device__ inline void stage_rows(const float (&output)[128], float2 scale, uint8_t* staging) {
    const int row = first_row_of_thread(), first = threadIdx.x % 4 * 4 + rotation(row);
    uint8_t* segment = staging + row * kSegmentBytes;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int at = (first + i * 16) % kSegmentBytes;
        const float* v = &output[4 * i];
        *reinterpret_cast<uint32_t*>(segment + at) = pack(v[0] * scale.x, v[1] * scale.x, T());
        *reinterpret_cast<uint32_t*>(segment + 8 * kSegmentBytes + at) =
            pack(v[2] * scale.y, v[3] * scale.y, T());
    }
}

// A consumer's half of the output, 64 x 256 in the layout of wgmma's accumulators.
__device__ inline void store_partial(const Partial& partial, int rows, const float (&output)[128],
                                     float2 scale, int consumer) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int octet = threadIdx.x % kWarpgroup / 32 * 2 + h;
        if (octet * kOctetRows + lane / 4 >= rows) continue;
        const int stride = partial.group_stride(octet) / 2;
        auto* at = reinterpret_cast<float2*>(partial.group(octet, consumer * kGroups / 2)) + lane;
        const float factor = h == 0 ? scale.x : scale.y;
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i)
            at[i * stride] = make_float2(output[4 * i + 2 * h] * factor, output[4 * i + 2 * h + 1] * factor);
    }
}

// Final rows of a consumer's half of the output. `v_tiles`: its half of the last page, which nothing reads
// any more.
template <typename T>
__device__ inline void store_rows(const DecodeParams& params, const RowTile& tile, const Split& split,
                                  const float (&output)[128], float2 scale, int consumer, uint8_t* v_tiles) {
    sync_warpgroup(consumer);  // every warp's products with the tiles are done
    stage_rows<T>(output, scale, v_tiles);
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
        reinterpret_cast<uint32_t*>(out_of<T>(params, split.seq, row_of(params, tile, split, row)) +
                                    consumer * kColumnsHalfV)[thread] = 0;
}

// One thread of each quad writes its rows' log-sum-exp.
__device__ inline void store_lse(const DecodeParams& params, const SplitPlace& place, const RowTile& tile,
                                 const Split& split, const OnlineSoftmax& softmax) {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row_of_tile = first_row_of_thread() + 8 * h;
        const Row row = row_of(params, tile, split, row_of_tile);
        if (!row.valid) continue;
        if (place.is_partial()) {
            Partial(params, tile, place, place.index).lse[row_of_tile] = softmax.log_sum_exp(h, -INFINITY);
        } else {
            *lse_of(params, split.seq, row) = softmax.log_sum_exp(h, INFINITY);
        }
    }
}

// Adds the other split's half to `output`, which was not scaled yet; returns by what to scale the sum.
__device__ inline float2 add_other_split(const DecodeParams& params, const RowTile& tile, const Split& split,
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
        const PairWeights weights(my_lse, other_lse);
        const float factor = weights.mine * scales[h];
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i) {
            const float2 value = __ldcg(at + i * stride);
            output[4 * i + 2 * h] = output[4 * i + 2 * h] * factor + value.x * weights.other;
            output[4 * i + 2 * h + 1] = output[4 * i + 2 * h + 1] * factor + value.y * weights.other;
        }
        scales[h] = weights.inverse;
        if (consumer == kLeft && lane % 4 == 0)
            *lse_of(params, split.seq, row_of(params, tile, split, row)) = weights.lse;
    }
    return make_float2(scales[0], scales[1]);
}

}  // namespace mla::many_rows

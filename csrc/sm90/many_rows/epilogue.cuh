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
    const int row = first_row_of_thread(), first = threadIdx.x % 4 * 4 + rotation(row);
    uint8_t* segment = staging + row * kSegmentBytes;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int at = (first + i * 16) % kSegmentBytes;
        const float* v = &output[4 * i];
        *reinterpret_cast<uint32_t*>(segment + at) = pack(v[0], v[1], T());
        *reinterpret_cast<uint32_t*>(segment + 8 * kSegmentBytes + at) = pack(v[2], v[3], T());
    }
}

__device__ inline void scale_output(float (&output)[128], float2 scale) {
#pragma unroll
    for (int i = 0; i < 128; ++i) output[i] *= i / 2 % 2 == 0 ? scale.x : scale.y;
}

// A consumer's half of the output, 64 x 256 in the layout of wgmma's accumulators, two values at a time by
// `store_pair(to, values)`.
template <typename StorePair>
__device__ inline void store_partial(const Partial& partial, int rows, const float (&output)[128],
                                     int consumer, StorePair&& store_pair) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int octet = threadIdx.x % kWarpgroup / 32 * 2 + h;
        if (octet * kOctetRows + lane / 4 >= rows) continue;
        const int stride = partial.group_stride(octet) / 2;
        auto* at = reinterpret_cast<float2*>(partial.group(octet, consumer * kGroups / 2)) + lane;
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i, at = ptx::further(at, stride))
            store_pair(at, make_float2(output[4 * i + 2 * h], output[4 * i + 2 * h + 1]));
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

// Adds the other split's half to `output`, which `scale` normalizes.
__device__ inline void add_other_split(const DecodeParams& params, const RowTile& tile, const Split& split,
                                       const SplitPlace& place, int consumer, float2 scale,
                                       float (&output)[128]) {
    const Partial mine(params, tile, place, place.index), other(params, tile, place, 1 - place.index);
    const int lane = threadIdx.x % 32, rows = split.valid_rows(params, tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int octet = threadIdx.x % kWarpgroup / 32 * 2 + h, row = octet * kOctetRows + lane / 4;
        if (row >= rows) continue;
        const int stride = other.group_stride(octet) / 2;
        const float my_lse = __ldcg(mine.lse + row), other_lse = __ldcg(other.lse + row);
        const auto* at = reinterpret_cast<const float2*>(other.group(octet, consumer * kGroups / 2)) + lane;
        const PairWeights weights(my_lse, other_lse);
        const float of_mine = weights.mine * weights.inverse * (h == 0 ? scale.x : scale.y);
        const float of_other = weights.other * weights.inverse;
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i, at = ptx::further(at, stride)) {
            const float2 value = __ldcg(at);
            float* total = &output[4 * i + 2 * h];
            total[0] = total[0] * of_mine + value.x * of_other;
            total[1] = total[1] * of_mine + value.y * of_other;
        }
        if (consumer == kLeft && lane % 4 == 0)
            *lse_of(params, split.seq, row_of(params, tile, split, row)) = weights.lse;
    }
}

// Stores a chunk for the merge, before which many pages pass through the L2.
__device__ inline void store_chunk(const DecodeParams& params, const RowTile& tile, const Chunk& chunk,
                                   int consumer, const float (&output)[128]) {
    const uint64_t kept = ptx::evict_last();
    store_partial(Partial(params, tile, chunk.place, chunk.place.index), chunk.valid_rows(params, tile),
                  output, consumer, [&](float2* to, float2 values) { ptx::store(to, values, kept); });
}

// Adds all earlier chunks of a sequence, which these very threads have stored, to the last one's `output`.
__device__ inline void add_other_chunks(const DecodeParams& params, const RowTile& tile, const Chunk& chunk,
                                        int consumer, float (&output)[128]) {
    const Partial first(params, tile, chunk.place, 0);
    const int lane = threadIdx.x % 32, rows = chunk.valid_rows(params, tile), last = chunk.place.index;
    const uint64_t read_once = ptx::evict_first();
    float2 scale = make_float2(1.f, 1.f);
    __syncwarp();  // one lane of each quad has stored the rows' log-sum-exp
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int octet = threadIdx.x % kWarpgroup / 32 * 2 + h, row = octet * kOctetRows + lane / 4;
        if (row >= rows) continue;
        const int stride = first.group_stride(octet) / 2;
        const float* lse = first.lse + row;
        const auto* at = reinterpret_cast<const float2*>(first.group(octet, consumer * kGroups / 2)) + lane;
        ChunkSum sum;
        const auto of_last = sum.add(__ldcg(lse + last * params.partial_rows));
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            float& total = output[4 * (i / 2) + 2 * h + i % 2];
            total = of_last(0.f, total);
        }
#pragma unroll 1
        for (int other = 0; other < last; ++other) {
            const auto of_other = sum.add(__ldcg(lse));
            const float2* group = at;
#pragma unroll
            for (int i = 0; i < kGroups / 2; ++i, group = ptx::further(group, stride)) {
                const float2 value = ptx::load(group, read_once);
                float* total = &output[4 * i + 2 * h];
                total[0] = of_other(total[0], value.x);
                total[1] = of_other(total[1], value.y);
            }
            lse += params.partial_rows;
            at += static_cast<int64_t>(params.partial_rows) * (kHeadDimV / 2);
        }
        (h == 0 ? scale.x : scale.y) = sum.inverse();
        if (consumer == kLeft && lane % 4 == 0)
            *lse_of(params, chunk.seq, row_of(params, tile, chunk, row)) = sum.lse();
    }
    scale_output(output, scale);
}

}  // namespace mla::many_rows

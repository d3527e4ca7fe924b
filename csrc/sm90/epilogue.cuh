// A split's result from registers to memory: a float32 partial for the merge, or final rows in q's dtype.
//
// Partials go straight from registers. Final rows would be stored in pieces of 16 bytes: a warpgroup lays
// them out in the V tiles of its last page, which it still holds, and stores whole lines from there.
#pragma once

#include "partial.cuh"
#include "softmax.cuh"

namespace mla {

constexpr int kSegmentBytes = kColumnsHalfV * 2;  // a warpgroup's share of a row

// Index of the thread's first row in the tile; its second is 8 further.
__device__ inline int first_row_of_thread() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

__device__ inline float* lse_of(const DecodeParams& params, int seq, const Row& row) {
    const QueryPlace query(params, seq);
    return params.lse + query.batch * params.lse_stride[0] + row.head * params.lse_stride[1] +
           (query.token + row.token) * params.lse_stride[2];
}

template <typename T>
__device__ inline T* out_of(const DecodeParams& params, int seq, const Row& row) {
    const QueryPlace query(params, seq);
    return static_cast<T*>(params.out) + query.batch * params.out_stride[0] +
           (query.token + row.token) * params.out_stride[1] + row.head * params.out_stride[2];
}

// Segments begin 16 bytes further in each of 8 neighbouring rows, and wrap around: no bank conflicts.
__device__ inline int rotation(int row_of_tile) {
    return row_of_tile % 8 * 16;
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

template <typename T>
__device__ inline void copy_rows(const DecodeParams& params, const RowTile& tile, const Split& split,
                                 const uint8_t* staging, int first_column) {
    const int warp = threadIdx.x % kWarpgroup / 32, at = threadIdx.x % 32 * sizeof(uint4);
    const int rows = split.valid_rows(params, tile);
#pragma unroll 2
    for (int row = warp; row < rows; row += 4) {
        T* out = out_of<T>(params, split.seq, row_of(params, tile, split, row)) + first_column;
        *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(out) + at) = *reinterpret_cast<const uint4*>(
            staging + row * kSegmentBytes + (at + rotation(row)) % kSegmentBytes);
    }
    ptx::fence_async_proxy();  // these reads come before the copy engine's next writes
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

}  // namespace mla

// Final rows in q's dtype to `out`: from shared memory, where a warpgroup lays its half of the columns out
// and stores whole lines, or from the registers of those that merged them. And where a row's results go.
#pragma once

#include "numbers.cuh"
#include "partial.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

constexpr int kSegmentBytes = kColumnsHalfV * 2;  // a warpgroup's share of a row

__device__ inline float* lse_of(const DecodeParams& params, const Query& query, const Row& row) {
    return params.lse + query.batch * params.lse_stride[0] + row.head * params.lse_stride[1] +
           (query.token + row.token) * params.lse_stride[2];
}

// A row's weights, to its place among a partial's, or where these are null their log-sum-exp as a result.
__device__ inline void store_weights_of_row(const DecodeParams& params, const Split& split, const Row& row,
                                            int row_of_tile, const WeightSum& weights, float2* of_partial) {
    if (of_partial) {
        of_partial[row_of_tile] = make_float2(weights.max, weights.sum);
    } else {
        *lse_of(params, split.query, row) = weights.log_sum_exp();
    }
}

template <typename T>
__device__ inline T* out_of(const DecodeParams& params, const Query& query, const Row& row) {
    return static_cast<T*>(params.out) + query.batch * params.out_stride[0] +
           (query.token + row.token) * params.out_stride[1] + row.head * params.out_stride[2];
}

// A segment's pieces of 16 bytes change places, differently in each of 8 neighbouring rows: no bank
// conflicts.
__device__ inline int swizzled(int at, int row_of_tile) {
    return at ^ row_of_tile % 8 * 16;
}

template <typename T>
__device__ inline void copy_rows(const DecodeParams& params, const RowTile& tile, const Split& split,
                                 const uint8_t* staging, int first_column) {
    const int warp = threadIdx.x % kWarpgroup / 32, at = threadIdx.x % 32 * sizeof(uint4);
    const int rows = split.valid_rows(params, tile);
#pragma unroll 1
    for (int row = warp; row < rows; row += 4) {
        T* out = out_of<T>(params, split.query, row_of(params, tile, split, row)) + first_column;
        *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(out) + at) =
            *reinterpret_cast<const uint4*>(staging + row * kSegmentBytes + swizzled(at, row));
    }
}

// What a half-warp has merged of an octet of rows: lane 2 r + i has columns 4 i to 4 i + 3 of row r, in
// kVectors groups of columns, each second one from `group` on: sums, to be divided by that of the weights.
template <typename T, int kVectors>
__device__ inline void store_merged(const DecodeParams& params, const RowTile& tile, const Split& split,
                                    int octet, int group, const float4 (&sum)[kVectors],
                                    const WeightSum& weights) {
    const int lane = threadIdx.x % 16;
    const Row row = row_of(params, tile, split, octet * kOctetRows + lane / 2);
    if (!row.valid) return;
    T* out = out_of<T>(params, split.query, row) + group * kGroupColumns + lane % 2 * 4;
    const float scale = weights.inverse();
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<uint2*>(out + 2 * v * kGroupColumns) = make_uint2(
            pack(sum[v].x * scale, sum[v].y * scale, T()), pack(sum[v].z * scale, sum[v].w * scale, T()));
    if (group == 0 && lane % 2 == 0) *lse_of(params, split.query, row) = weights.log_sum_exp();
}

}  // namespace mla

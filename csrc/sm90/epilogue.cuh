// A split's result from registers to memory: final rows in q's dtype, or float32 partials for the merge.
#pragma once

#include "softmax.cuh"
#include "work.cuh"

namespace mla {

__device__ inline void store_pair(float* out, float low, float high) {
    *reinterpret_cast<float2*>(out) = make_float2(low, high);
}

template <typename T>
__device__ inline void store_pair(T* out, float low, float high) {
    *reinterpret_cast<uint32_t*>(out) = pack(low, high, T());
}

// Half h of `output` (64 x 256, laid out like scores) to one row of 256 columns.
template <typename Out>
__device__ inline void store_row(const float (&output)[128], int h, float scale, Out* row) {
    row += threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i)
        store_pair(row + i * 8, output[4 * i + 2 * h] * scale, output[4 * i + 2 * h + 1] * scale);
}

// Index of the thread's first row in the tile; its second is 8 further.
__device__ inline int first_row_of_thread() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

__device__ inline int64_t partial_row(const DecodeParams& params, const Split& split, const Row& row) {
    const int64_t rows = static_cast<int64_t>(params.query_len) * params.num_heads;
    return split.partial_slot * rows + row.token * params.num_heads + row.head;
}

// Writes a warpgroup's 64 x 256 half of the output, from column `first_column`.
template <typename T>
__device__ inline void store_output(const DecodeParams& params, const RowTile& tile, const Split& split,
                                    const float (&output)[128], float2 scale, int first_column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Row row = tile.row(params, first_row_of_thread() + 8 * h);
        if (!row.valid) continue;
        const float row_scale = h == 0 ? scale.x : scale.y;
        if (split.is_partial()) {
            float* out = params.out_partial + partial_row(params, split, row) * kHeadDimV;
            store_row(output, h, row_scale, out + first_column);
        } else {
            T* out = static_cast<T*>(params.out) + split.seq * params.out_stride[0] +
                     row.token * params.out_stride[1] + row.head * params.out_stride[2];
            store_row(output, h, row_scale, out + first_column);
        }
    }
}

// One thread of each quad writes its rows' log-sum-exp.
__device__ inline void store_lse(const DecodeParams& params, const RowTile& tile, const Split& split,
                                 const OnlineSoftmax& softmax) {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Row row = tile.row(params, first_row_of_thread() + 8 * h);
        if (!row.valid) continue;
        if (split.is_partial()) {
            params.lse_partial[partial_row(params, split, row)] = softmax.log_sum_exp(h, -INFINITY);
        } else {
            params.lse[split.seq * params.lse_stride[0] + row.head * params.lse_stride[1] +
                       row.token * params.lse_stride[2]] = softmax.log_sum_exp(h, INFINITY);
        }
    }
}

}  // namespace mla

// A split's result from registers to memory: float32 partials for the merge, or final rows in q's dtype.
//
// Partials go straight from registers: a quad's 32 bytes are a full sector. Final rows would be halves of
// sectors: a warpgroup lays them out in the V tiles of its last page, which it still holds, and the copy
// engine carries them off. (Partials by that way were slower: twice the bytes, so two rounds.)
#pragma once

#include "softmax.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

constexpr int kSegmentBytes = kColumnsHalfV * 2;  // a warpgroup's share of a row

// Index of the thread's first row in the tile; its second is 8 further.
__device__ inline int first_row_of_thread() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

__device__ inline int64_t partial_row(const DecodeParams& params, const Split& split, const Row& row) {
    const int64_t rows = static_cast<int64_t>(params.query_len) * params.num_heads;
    return split.partial_slot * rows + row.token * params.num_heads + row.head;
}

__device__ inline float* partial_of(const DecodeParams& params, const Split& split, const Row& row) {
    return params.out_partial + partial_row(params, split, row) * kHeadDimV;
}

template <typename T>
__device__ inline T* out_of(const DecodeParams& params, const Split& split, const Row& row) {
    return static_cast<T*>(params.out) + split.seq * params.out_stride[0] + row.token * params.out_stride[1] +
           row.head * params.out_stride[2];
}

// Half h of `output` (64 x 256, laid out like scores) to one row of 256 columns.
__device__ inline void store_partial_row(const float (&output)[128], int h, float scale, float* row) {
    auto* pairs = reinterpret_cast<float2*>(row) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 32; ++i)
        pairs[4 * i] = make_float2(output[4 * i + 2 * h] * scale, output[4 * i + 2 * h + 1] * scale);
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

// Two threads a row, one for the segment's beginning and one for what wrapped around.
template <typename T>
__device__ inline void copy_rows(const DecodeParams& params, const RowTile& tile, const Split& split,
                                 const uint8_t* staging, int first_column) {
    const int row_of_tile = threadIdx.x % kWarpgroup / 2;
    const Row row = tile.row(params, row_of_tile);
    const int wrapped = rotation(row_of_tile);
    const bool beginning = threadIdx.x % 2 == 0;
    const int bytes = beginning ? kSegmentBytes - wrapped : wrapped;
    if (row.valid && bytes > 0) {
        const uint8_t* segment = staging + row_of_tile * kSegmentBytes;
        auto* out = reinterpret_cast<uint8_t*>(out_of<T>(params, split, row) + first_column);
        ptx::store_bulk(out + (beginning ? 0 : kSegmentBytes - wrapped), segment + (beginning ? wrapped : 0),
                        bytes);
    }
    ptx::commit_bulk_stores();
    ptx::wait_bulk_stores_read();
}

// Writes a warpgroup's 64 x 256 half of the output, from column `first_column`. `v_tiles`: the warpgroup's
// half of its last page, which nothing reads any more.
template <typename T>
__device__ inline void store_output(const DecodeParams& params, const RowTile& tile, const Split& split,
                                    const float (&output)[128], float2 scale, int first_column,
                                    uint8_t* v_tiles, NamedBarrier warpgroup) {
    if (split.is_partial()) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Row row = tile.row(params, first_row_of_thread() + 8 * h);
            if (!row.valid) continue;
            store_partial_row(output, h, h == 0 ? scale.x : scale.y,
                              partial_of(params, split, row) + first_column);
        }
        return;
    }
    ptx::named_barrier_wait(warpgroup, kWarpgroup);  // every warp's products with the tiles are done
    stage_rows<T>(output, scale, v_tiles);
    ptx::fence_async_proxy();
    ptx::named_barrier_wait(warpgroup, kWarpgroup);
    copy_rows<T>(params, tile, split, v_tiles, first_column);
}

// A split without pages: zeros, by both consumers, half of the columns each.
template <typename Out>
__device__ inline void zero_half_row(Out* row, int chunk) {
    reinterpret_cast<uint4*>(row)[chunk] = make_uint4(0, 0, 0, 0);
}

template <typename T>
__device__ inline void store_no_output(const DecodeParams& params, const RowTile& tile, const Split& split,
                                       int first_column) {
    const int chunks =
        kColumnsHalfV * (split.is_partial() ? sizeof(float) : sizeof(T)) / sizeof(uint4);  // of a row
    for (int i = threadIdx.x % kWarpgroup; i < kTileRows * chunks; i += kWarpgroup) {
        const Row row = tile.row(params, i / chunks);
        if (!row.valid) continue;
        if (split.is_partial()) {
            zero_half_row(partial_of(params, split, row) + first_column, i % chunks);
        } else {
            zero_half_row(out_of<T>(params, split, row) + first_column, i % chunks);
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

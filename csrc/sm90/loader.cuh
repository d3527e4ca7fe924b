// The producer warpgroup: one warp streams pages of the cache, three warps fetch the rows of q.
#pragma once

#include "ptx.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

constexpr int kQueryLoaders = 96;  // threads

// Pages in the order of the work, each as nine boxes, as soon as the consumers give their places back. The
// rope tile goes first: it is free first, and the scores begin with it.
__device__ inline void load_pages(const DecodeParams& params, const CUtensorMap& k_map, SharedStorage& shared,
                                  int part, int kv_head) {
    const int lane = threadIdx.x % 32;
    RingPosition<kStages> stage;
    for_each_split(params, part, [&](const Split& split) {
        const int* table = params.block_table + split.seq * params.block_table_stride;
        int pages_ahead = 0;  // lane i: entry i of the 32 that were read together
        for (int page = split.page_begin; page < split.page_end; ++page) {
            const int ahead = (page - split.page_begin) % 32;
            if (ahead == 0) pages_ahead = page + lane < split.page_end ? table[page + lane] : 0;
            const int page_index = __shfl_sync(~0u, pages_ahead, ahead);

            auto load_tiles = [&](TileGroup group, int first, int last) {
                ptx::barrier_wait(&shared.k_empty[stage.slot][group], stage.parity ^ 1);
                if (lane != 0) return;
                for (int tile = first; tile <= last; ++tile) {
                    uint64_t* full = &shared.k_full[stage.slot][tile];
                    ptx::barrier_arrive_expect(full, kTileBytes);
                    ptx::load_tensor_4d(shared.k[stage.slot][tile], k_map, full, tile * kTileColumns, 0,
                                        kv_head, page_index);
                }
            };
            load_tiles(kRope, kRopeTile, kRopeTile);
            load_tiles(kLeftV, 0, kTilesHalfV - 1);
            load_tiles(kRightV, kTilesHalfV, kTilesV - 1);
            stage.next();
        }
    });
}

// The 64 rows of q, each split, in the swizzle that wgmma reads. Ordinary loads, not the copy engine: rows
// may cross from one query token to the next, q_nope and q_pe are apart, and their strides are the caller's.
template <typename T>
__device__ inline void load_queries(const DecodeParams& params, SharedStorage& shared, int part,
                                    const RowTile& tile) {
    constexpr int kChunks = 8;  // of 16 bytes in a tile's row
    constexpr int kElements = 16 / sizeof(T);
    const int thread = threadIdx.x - (kThreads - kQueryLoaders);
    const int chunk = thread % kChunks;
    RingPosition<1> round;
    for_each_split(params, part, [&](const Split& split) {
        if (split.is_empty()) return;
        ptx::barrier_wait(&shared.q_empty, round.parity ^ 1);
        for (int r = thread / kChunks; r < kTileRows; r += kQueryLoaders / kChunks) {
            const Row row = tile.row(params, r);
            const T* nope = static_cast<const T*>(params.q_nope);
            const T* rope = static_cast<const T*>(params.q_pe);
            if (row.valid) {
                nope += split.seq * params.q_nope_stride[0] + row.token * params.q_nope_stride[1] +
                        row.head * params.q_nope_stride[2];
                rope += split.seq * params.q_pe_stride[0] + row.token * params.q_pe_stride[1] +
                        row.head * params.q_pe_stride[2];
            }
            const uint32_t smem = ptx::smem_address(shared.q) + r * 128 + (chunk ^ r % 8) * 16;
            for (int t = 0; t < kTilesV; ++t)
                ptx::load_16_bytes(smem + t * kTileBytes, nope + t * kTileColumns + chunk * kElements,
                                   row.valid);
            ptx::load_16_bytes(smem + kRopeTile * kTileBytes, rope + chunk * kElements, row.valid);
        }
        ptx::wait_16_byte_loads();
        ptx::fence_async_proxy();
        ptx::barrier_arrive(&shared.q_full);
        round.next();
    });
}

}  // namespace mla

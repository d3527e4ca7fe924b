// Values past a sequence's end.
#pragma once

#include "tiles.cuh"

namespace mla {

// Tokens past the end of the sequence may hold NaN, and 0 * NaN is NaN: their values become 0. Called by the
// warpgroup that multiplies these tiles.
template <int kCount>
__device__ inline void zero_values_past_end(uint8_t (*tiles)[kTileBytes], int valid_tokens, int consumer) {
    constexpr int kChunksPerRow = 128 / 16;
    const int first = valid_tokens * kChunksPerRow;
#pragma unroll 1
    for (int chunk = first + threadIdx.x % kWarpgroup; chunk < 64 * kChunksPerRow; chunk += kWarpgroup)
#pragma unroll
        for (int tile = 0; tile < kCount; ++tile)
            reinterpret_cast<uint4*>(tiles[tile])[chunk] = make_uint4(0, 0, 0, 0);
    ptx::fence_async_proxy();
    sync_warpgroup(consumer);
}

}  // namespace mla

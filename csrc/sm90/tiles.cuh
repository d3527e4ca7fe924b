// What both decode kernels have in common: tiles in shared memory, warpgroups, and who waits for whom.
//
// A tile is 64 rows x 64 columns of 16-bit values in the 128-byte swizzle that wgmma and the copy engine
// share: 8 KB. A page of the cache is 9 tiles (its 64 tokens), Q is 9 tiles of its own rows; tiles 0 to 7 are
// the latent part, which is also V, tile 8 is the rope part.
#pragma once

#include <cstdint>

#include "../params.h"
#include "ptx.cuh"

namespace mla {

constexpr int kRowBytes = kTileColumns * 2;
constexpr int kTileBytes = 64 * kRowBytes;
constexpr int kSwizzleAtomBytes = 1024;            // 8 rows: what tiles are aligned to
constexpr int kTiles = kHeadDim / kTileColumns;    // 9
constexpr int kTilesV = kHeadDimV / kTileColumns;  // 8
constexpr int kColumnsHalfV = kHeadDimV / 2;
constexpr int kRopeTile = kTilesV;
constexpr int kStages = 2;  // pages in shared memory: 144 KB

constexpr int kWarpgroup = 128;
constexpr int kWarps = kWarpgroup / 32;
constexpr int kMaxSharedBytes = 227 * 1024;  // a thread block's

constexpr int kConsumers = 2;                            // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last one loads

// The page's tiles in the groups that arrive together, and are given back. The last ones are those of V's
// right half that a kernel gives back late; it may have none.
enum TileGroup { kLeftV, kRightV, kRope, kLateV, kTileGroups };

template <int kLateTiles>
struct PageGroups {
    static constexpr int first_tile(TileGroup group) {
        return group == kLateV ? kTilesV - kLateTiles : group * kTilesHalfV;
    }
    static constexpr int tiles_in(TileGroup group) {
        if (group == kRope) return 1;
        return group == kLateV ? kLateTiles : kTilesHalfV - (group == kRightV ? kLateTiles : 0);
    }
    // The group that begins with the tile; where none does, kTileGroups.
    static constexpr int beginning_with(int tile) {
        if (kLateTiles > 0 && tile == first_tile(kLateV)) return kLateV;
        return tile % kTilesHalfV == 0 ? tile / kTilesHalfV : kTileGroups;
    }
};

// The ring of pages: what is there, and what was given back.
struct PageBarriers {
    uint64_t full[kStages][kTileGroups];
    uint64_t empty[kStages][kTileGroups];
};

// Once a block, by the producer's threads, which wait for nobody: barriers are set up.
__device__ inline void arrive_at_start() {
    __syncwarp();  // the lane that did it is back
    asm volatile("barrier.cta.arrive 0, %0;" ::"n"(kThreads) : "memory");
}

// By the consumers'.
__device__ inline void wait_for_start() {
    asm volatile("barrier.cta.sync 0, %0;" ::"n"(kThreads) : "memory");
}

// Waits for the other threads of a consumer warpgroup; barrier 0 is the block's.
__device__ inline void sync_warpgroup(int consumer) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(consumer + 1), "n"(kWarpgroup) : "memory");
}

// Likewise; whether `value` holds for any of them.
__device__ inline bool any_of_warpgroup(int consumer, bool value) {
    uint32_t any;
    asm volatile(
        "{\n"
        ".reg .pred value, any;\n"
        "setp.ne.u32 value, %3, 0;\n"
        "barrier.cta.red.or.pred any, %1, %2, value;\n"
        "selp.u32 %0, 1, 0, any;\n"
        "}\n"
        : "=r"(any)
        : "r"(consumer + 1), "n"(kWarpgroup), "r"(static_cast<uint32_t>(value))
        : "memory");
    return any != 0;
}

// A warpgroup's warps give back a group of tiles.
__device__ inline void init_page_barriers(PageBarriers& pages) {
    for (int stage = 0; stage < kStages; ++stage) {
        for (int group = 0; group < kTileGroups; ++group) {
            ptx::barrier_init(&pages.full[stage][group], 1);
            ptx::barrier_init(&pages.empty[stage][group], kWarps);
        }
    }
}

// Arrives once for each warp, after all of its lanes are done.
__device__ inline void warp_arrive(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
}

// A ring of barriers: which slot, and the parity of the round. `wait` before use, `next` after.
template <int kSlots>
struct RingPosition {
    int slot = 0;
    uint32_t parity = 0;
    __device__ void next() {
        if (++slot == kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

}  // namespace mla

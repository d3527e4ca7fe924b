// What lies where in shared memory, and who waits for whom.
//
// A tile is 64 rows x 64 columns of 16-bit values in the 128-byte swizzle that wgmma and the copy engine
// share: 8 KB. Q is 9 tiles (its 64 rows), a page of the cache is 9 tiles (its 64 tokens); tiles 0 to 7 are
// the latent part, which is also V, tile 8 is the rope part.
#pragma once

#include <cstdint>

#include "../params.h"

namespace mla {

constexpr int kTileColumns = 64;
constexpr int kRowBytes = kTileColumns * 2;
constexpr int kTileBytes = 64 * kRowBytes;
constexpr int kSwizzleAtomBytes = 1024;            // 8 rows: what tiles are aligned to
constexpr int kTiles = kHeadDim / kTileColumns;    // 9
constexpr int kTilesV = kHeadDimV / kTileColumns;  // 8
constexpr int kTilesHalfV = kTilesV / 2;           // a consumer warpgroup's share of V's columns
constexpr int kColumnsHalfV = kHeadDimV / 2;
constexpr int kRopeTile = kTilesV;
constexpr int kStages = 2;  // pages in shared memory: 144 KB beside Q's 72 KB

constexpr int kWarpgroup = 128;

// How a block's share of the work is cut and merged; a kernel of its own for each.
enum class Mode {
    kFewRows,         // in splits; less code, which counts where a call is short
    kManyRows,        // in splits; two of them may exchange halves, which spares the traffic of partials
    kBatchInvariant,  // in chunks
};

enum Consumer { kLeft = 0, kRight = 1 };
constexpr int kConsumers = 2;                            // warpgroups
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last one loads

// The page's tiles in the groups that are given back together: each V half by the warpgroup that multiplies
// it, the rope tile once the weights that took its place are read.
enum TileGroup { kLeftV = 0, kRightV = 1, kRope = 2, kTileGroups = 3 };

struct SharedStorage {
    alignas(kSwizzleAtomBytes) uint8_t q[kTiles][kTileBytes];
    alignas(kSwizzleAtomBytes) uint8_t k[kStages][kTiles][kTileBytes];
    // From the first consumer to the second, a float2 for each thread's two rows: by how much to scale the
    // output before the page is added, and after the last.
    float2 scale[kStages][kWarpgroup];
    float2 normalizer[kStages][kWarpgroup];
    uint32_t tickets[kConsumers][2];  // arrivals.cuh: of the part's first sequence and of its last
    PartPlan plan;
    uint64_t q_empty;
    uint64_t k_full[kStages][kTiles];
    uint64_t k_empty[kStages][kTileGroups];
    uint64_t weights_full[kStages];
    uint64_t normalizer_full[kStages];
};
static_assert(sizeof(SharedStorage) <= 227 * 1024, "exceeds the shared memory of a thread block");

// Waits for the other threads of a consumer warpgroup; barrier 0 is __syncthreads'.
__device__ inline void sync_warpgroup(int consumer) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(consumer + 1), "n"(kWarpgroup) : "memory");
}

// Waits for both consumer warpgroups.
__device__ inline void sync_consumers() {
    asm volatile("barrier.cta.sync %0, %1;" ::"n"(kConsumers + 1), "n"(kConsumers * kWarpgroup) : "memory");
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

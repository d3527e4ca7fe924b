// What lies where in the shared memory of the kernel for many rows, and who waits for whom.
#pragma once

#include "../arrivals.cuh"
#include "../chunks.cuh"
#include "../merge.cuh"
#include "../tiles.cuh"
#include "softmax.cuh"

namespace mla::many_rows {

enum Consumer { kLeft = 0, kRight = 1 };

// Each V half of a page is given back by the warpgroup that multiplies it, the right one's last quarter of V
// later than the rest; the rope tile once the weights that took its place are read.
struct Storage {
    static constexpr bool kOneTile = false;
    static constexpr bool kQueryHasBarrier = false;  // it comes under those of its first page
    static constexpr bool kHalfMayIdle = false;      // of the parts, by the plan
    static constexpr int kLatentBoxTiles = latent_box_tiles(kTileRows);
    using Groups = PageGroups<kTilesQuarterV>;  // its late tiles: see consume_right

    alignas(kSwizzleAtomBytes) uint8_t q[kTiles][kTileBytes];
    alignas(kSwizzleAtomBytes) uint8_t k[kStages][kTiles][kTileBytes];
    // From the first consumer to the second, for each thread's two rows: by how much to scale the output
    // before the page is added, and what ends a split.
    float2 scale[kStages][kWarpgroup];
    SplitEnd end[kStages][kWarpgroup];
    // A thread's own: the chunks so far of its two rows. Registers are short while there are pages.
    ChunkSum sums[kConsumers][kWarpgroup][2];
    Phases phases;
    BlockPlan plan;
    uint64_t q_empty;
    PageBarriers pages;
    uint64_t scored[kStages];  // the scores of the page there are worked out: when to go on, for no data
    uint64_t weights_full[kStages];
    uint64_t end_full[kStages];

    template <int kVectors>
    __device__ MergeScratch<kVectors>& merge_scratch(int consumer) {
        static_assert(sizeof(MergeScratch<kVectors>) <= sizeof(q[0]));
        return reinterpret_cast<MergeScratch<kVectors>&>(q[consumer]);  // no query is needed any more
    }
};
static_assert(sizeof(Storage) <= kMaxSharedBytes);

}  // namespace mla::many_rows

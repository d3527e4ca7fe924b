// What lies where in the shared memory of the kernel for few rows, and who waits for whom.
#pragma once

#include "../arrivals.cuh"
#include "../merge.cuh"
#include "../rows.cuh"
#include "../tiles.cuh"

namespace mla::few_rows {

// Consumer i scores the pages in stage i; their weights both then multiply, each with its half of V. So who
// scores a page gives its rope tile back, and each consumer its half.
template <int kRows>
struct Storage {
    static constexpr bool kOneTile = true;          // of each KV head: so is_short is known, for less code
    static constexpr bool kQueryHasBarrier = true;  // both consumers wait for it
    static constexpr bool kHalfMayIdle = true;      // of the parts, by the plan
    static constexpr int kLatentBoxTiles = latent_box_tiles(kRows);
    using Groups = PageGroups<0>;

    alignas(kSwizzleAtomBytes) uint8_t q[kTiles][kRows * kRowBytes];
    alignas(kSwizzleAtomBytes) uint8_t k[kStages][kTiles][kTileBytes];
    alignas(kSwizzleAtomBytes) uint8_t weights[kStages][kRows * kRowBytes];
    alignas(16) uint8_t staging[kConsumers][kRows * kSegmentBytes];  // of final rows, a consumer's own
    alignas(8) float page_max[kConsumers][kWarps][kRows];
    alignas(8) float max[kStages][kRows];  // to which the weights of the stage's page are relative
    bool raised[kStages];                  // whether that page has raised it
    // Of a consumer's weights, at the end of every second split or chunk: the other may still read those of
    // the last.
    alignas(16) float sum[2][kConsumers][kRows][kWarps];
    Phases phases;
    BlockPlan plan;
    uint64_t q_full;
    uint64_t q_empty;
    uint64_t meeting;  // of all threads of both consumers
    PageBarriers pages;
    uint64_t weights_full[kStages];

    template <int kVectors>
    __device__ MergeScratch<kVectors>& merge_scratch(int consumer) {
        static_assert(sizeof(MergeScratch<kVectors>) <= sizeof(staging[0]));
        return reinterpret_cast<MergeScratch<kVectors>&>(staging[consumer]);
    }
};
static_assert(kStages == kConsumers);
static_assert(sizeof(Storage<kFewRows>) <= kMaxSharedBytes);

}  // namespace mla::few_rows

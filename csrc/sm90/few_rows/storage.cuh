// What lies where in the shared memory of the kernel for few rows, and who waits for whom.
#pragma once

#include "../arrivals.cuh"
#include "../merge.cuh"
#include "../tiles.cuh"

namespace mla::few_rows {

constexpr int kScratchRows = 16;  // whose halves of the output are exchanged at a time
constexpr int kScratchBytes = kScratchRows * kColumnsHalfV * 4;

// Consumer i works on the pages in stage i, alone, with an output of its own, and gives all of a page back
// itself: the rope tile once the scores are there, each half of V once it is multiplied.
template <int kRows>
struct Storage {
    static constexpr bool kQueryHasBarrier = true;  // both consumers wait for it, each beside its own page
    static constexpr bool kHalfMayIdle = true;  // of the parts, by the plan: what launches spread them for

    alignas(kSwizzleAtomBytes) uint8_t q[kTiles][kRows * kRowBytes];
    alignas(kSwizzleAtomBytes) uint8_t k[kStages][kTiles][kTileBytes];
    alignas(kSwizzleAtomBytes) uint8_t weights[kConsumers][kRows * kRowBytes];
    // At a split's end: a consumer's half of the output for the other one, then the other's place for rows.
    alignas(kSwizzleAtomBytes) uint8_t scratch[kConsumers][kScratchBytes];
    float page_max[kConsumers][kWarps][kRows];
    alignas(16) float sum[kConsumers][kRows][kWarps];  // of the weights, at a split's end
    alignas(8) float max[kRows][kConsumers];           // to which they are relative
    Phases phases;
    BlockPlan plan;
    uint64_t q_full;
    uint64_t q_empty;
    uint64_t meeting;  // of all threads of both consumers
    PageBarriers pages;

    __device__ MergeScratch& merge_scratch(int consumer) {
        return reinterpret_cast<MergeScratch&>(scratch[1 - consumer]);
    }
};
static_assert(kStages == kConsumers);
static_assert(sizeof(Storage<kFewRows>) <= kMaxSharedBytes);
static_assert(sizeof(MergeScratch) <= kScratchBytes);

}  // namespace mla::few_rows

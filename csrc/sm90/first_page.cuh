// A guess at a part's first page, which the L2 fetches while the page's index is on its way.
//
// A step's layers are decoded by one plan and one block table, each from a cache of its own: where a part's
// first page lay in the launch before, it most likely lies in this one, too. A wrong guess leads to a page
// that nobody needs, or past the end of a smaller cache, where the copy engine fetches nothing.
#pragma once

#include "kernels.h"
#include "ptx.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

struct alignas(16) FirstPage {
    int seq, page;  // where the part starts by its plan; no sequence, -1, if it had no page
    int index;      // where its first page lay: an index that was used
    int unused;     // so that all is loaded and stored at once
};

// Plans are told apart by where they lie, in steps of torch's allocations: a draft model's calls, or those of
// the other mode, seldom disturb. That two share a place costs no more than wrong guesses.
constexpr int kPlans = 64, kPlanStep = 512;

// Of each part in the last launch by a plan. Each kernel's source has its own, 256 KB.
__device__ static FirstPage g_first_pages[kPlans][kMaxBlocks];

// By the grid's y, which stands for a part; its x, other KV heads or row tiles, begin with the same page.
__device__ inline FirstPage& first_page_of_block(const DecodeParams& params) {
    const uintptr_t plan = reinterpret_cast<uintptr_t>(params.parts) / kPlanStep % kPlans;
    return g_first_pages[plan][blockIdx.y % kMaxBlocks];
}

// By one thread.
template <Order kOrder>
__device__ inline void prefetch_first_page(const DecodeMaps& maps, const RowTile& tile, const BlockPlan& plan,
                                           const FirstPage& guess, int latent_box_tiles) {
    if (guess.seq != plan.start_seq<kOrder>() || guess.page != plan.start_page<kOrder>()) return;
    ptx::prefetch_box(maps.k_rope, 0, tile.kv_head, kRopeTile, guess.index, ptx::evict_first());
#pragma unroll 1
    for (int t = 0; t < kTilesV; t += latent_box_tiles)
        ptx::prefetch_box(maps.k_latent, 0, tile.kv_head, t, guess.index, ptx::evict_first());
}

}  // namespace mla

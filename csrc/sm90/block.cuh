// A thread block of the decode: two consumer warpgroups that walk the splits of the block's part and merge
// them at the end, and a producer whose one thread walks the same splits ahead of them.
#pragma once

#include "arrivals.cuh"
#include "loader.cuh"

namespace mla {

// Registers a thread: 3 x 128 threads share 65,536. Sums of chunks take more.
template <Mode kMode>
constexpr int kConsumerRegisters = kMode == Mode::kBatchInvariant ? 240 : 224;
template <Mode kMode>
constexpr int kProducerRegisters = kMode == Mode::kBatchInvariant ? 24 : 56;

// Storage: the kernel's shared memory; State: what a consumer keeps from one split to the next.
// Called are `init_barriers(shared)` by one thread, and by each consumer `consume(shared, tile, split,
// consumer, state)` for each split and `merge(shared, tile, consumer)` after the last.
template <Mode kMode, typename Storage, typename State, typename InitBarriers, typename Consume,
          typename Merge>
__device__ inline void run_block(const DecodeParams& params, const DecodeMaps& maps,
                                 InitBarriers&& init_barriers, Consume&& consume, Merge&& merge) {
    constexpr Order kOrder = kOrderOf<kMode>;
    extern __shared__ __align__(kSwizzleAtomBytes) uint8_t shared_memory[];
    Storage& shared = *reinterpret_cast<Storage*>(shared_memory);
    // First of all and by all: a branch before it would only delay it.
    const BlockPlan plan(params, Storage::kHalfMayIdle);
    const RowTile tile(params, params.first_row_tile + blockIdx.x, Storage::kOneTile);
    const int warpgroup = ptx::uniform(threadIdx.x / kWarpgroup);
    const bool in_producer_warp = ptx::uniform(threadIdx.x / 32) == kConsumers * kWarps;
    if (in_producer_warp && ptx::elect_lane()) {  // while the plan is on its way
        if (ptx::smem_address(shared_memory) % kSwizzleAtomBytes != 0) __trap();  // swizzles count from there
        init_barriers(shared);
        prefetch_maps(maps);
    }
    // first_page.cuh, by a warp that has nothing else to do. Blocks that share pages would come out of step.
    const bool guesses = (Storage::kOneTile || !share_pages(params)) &&
                         ptx::uniform(threadIdx.x / 32) == kConsumers * kWarps + 1;
    FirstPage guess{};
    if (guesses) guess = first_page_of_block(params);
    // This way around the producer's code comes first, and it is the first that is needed.
    if (warpgroup < kConsumers) {
        if (threadIdx.x == 0) shared.plan = plan;
        wait_for_start();
        ptx::take_registers<kConsumerRegisters<kMode>>();
        State state;
        read_phases(params, shared.plan, shared.phases, warpgroup);
        for_each_split<kOrder>(params, shared.plan, tile,
                               [&](const Split& split) { consume(shared, tile, split, warpgroup, state); });
        merge(shared, tile, warpgroup);
        return;
    }
    Loader<Storage, kMode> loader(params, maps, shared, plan, tile);
    if (in_producer_warp && ptx::elect_lane()) loader.begin();
    arrive_at_start();  // and waits for no other warp: the barriers are set up by the lane that uses them
    if (guesses && ptx::elect_lane())
        prefetch_first_page<kOrder>(maps, tile, plan, guess, Storage::kLatentBoxTiles);
    ptx::give_registers<kProducerRegisters<kMode>>();
    if (in_producer_warp && ptx::elect_lane()) loader.load_all();
}

}  // namespace mla

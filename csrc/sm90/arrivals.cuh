// Who has written its partial: a counter for each sequence that is cut.
//
// All blocks of a launch run at the same time (it is a cooperative one), so waiting ends.
#pragma once

#include "kernels.h"
#include "ptx.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

constexpr uint32_t kAllArrived = 1u << 31;

// A counter for each block, used for the sequence that is cut at its part's end. When all have arrived its
// top bit, the phase, flips and the rest is zero again: no launch has to reset it. Each kernel's source has
// its own, 1 MB.
__device__ static uint32_t g_arrivals[kArrivalsSlots][kMaxBlocks];

// Of a sequence whose split of this number is this block's.
__device__ inline uint32_t* arrivals_of(const DecodeParams& params, const BlockPlan& plan, int split) {
    return &g_arrivals[params.arrivals_slot][(plan.part - split) * gridDim.x + blockIdx.x];
}

// What each consumer found in the counters before it arrived: of the part's first sequence and of its last.
using Phases = uint32_t[kConsumers][2];

// Called at the block's start, when there is time. The phases do not flip before this block has arrived. A
// single part splits nothing: its blocks may be more than there are counters.
__device__ inline void read_phases(const DecodeParams& params, const BlockPlan& plan, Phases& phases,
                                   int consumer) {
    if (threadIdx.x % kWarpgroup != 0 || params.num_parts == 1) return;
    const uint32_t of_first = ptx::signal_peek(arrivals_of(params, plan, first_split_of(plan)));
    const uint32_t of_last = ptx::signal_peek(arrivals_of(params, plan, 0));
    phases[consumer][0] = of_first & kAllArrived;
    phases[consumer][1] = of_last & kAllArrived;
}

// Says that this warpgroup's half of a partial is written.
__device__ inline void arrive(const DecodeParams& params, const BlockPlan& plan, const SplitPlace& place,
                              int consumer) {
    sync_warpgroup(consumer);
    if (threadIdx.x % kWarpgroup != 0) return;
    const uint32_t others = place.num_splits * kConsumers - 1;
    const bool is_first = place.index == 0 && consumer == 0;
    ptx::signal_add(arrivals_of(params, plan, place.index), is_first ? kAllArrived - others : 1);
}

// All warps look for themselves, and by a vote: a loop that lanes leave one by one would cost the kernel's
// main loop its uniform registers.
__device__ inline void wait_for_all(const DecodeParams& params, const BlockPlan& plan, const Phases& phases,
                                    const Split& split, const SplitPlace& place, int consumer) {
    const uint32_t before = phases[consumer][split.seq != plan.first_seq];
    const uint32_t* counter = arrivals_of(params, plan, place.index);
    while (!__all_sync(~0u, (ptx::signal_read(counter) & kAllArrived) != before)) {
    }
}

}  // namespace mla

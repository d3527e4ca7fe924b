// Split-KV MLA decode for Hopper where few query rows share a KV head: one block of three warpgroups works on
// all of them and one part of the plan, and merges its share of what several parts worked on. The products
// are transposed: keys, or columns of V, lie along wgmma's 64, the 16 or 32 rows along its narrow side, so
// that little is multiplied in vain and a query, an output and the code that handles them are small.
#include "../block.cuh"
#include "../kernels.h"
#include "chunks.cuh"

namespace mla {
namespace few_rows {
namespace {

template <int kRows>
__device__ void init_barriers(Storage<kRows>& shared) {
    ptx::barrier_init(&shared.q_full, 1);
    ptx::barrier_init(&shared.q_empty, kConsumers * kWarps);
    ptx::barrier_init(&shared.meeting, kConsumers * kWarpgroup);
    init_page_barriers(shared.pages);
    for (int stage = 0; stage < kStages; ++stage) ptx::barrier_init(&shared.weights_full[stage], kWarpgroup);
    ptx::fence_barrier_init();
}

template <typename T, int kRows, Mode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodeMaps maps) {
    const auto consume = [&](Storage<kRows>& shared, const RowTile& tile, const Split& split, int consumer,
                             ConsumerState& state) {
        if constexpr (kMode == Mode::kBatchInvariant) {
            consume_chunks<T, kRows>(params, shared, tile, split, consumer, state);
        } else {
            consume_split<T, kRows>(params, shared, tile, split, consumer, state);
        }
    };
    const auto merge = [&](Storage<kRows>& shared, const RowTile& tile, int consumer) {
        if constexpr (kMode == Mode::kBatchInvariant) {
            merge_chunks<T, 8, 4, 1>(params, shared.plan, shared.phases, tile, consumer);
        } else {
            // Of two octets of rows even small items would be too few if a half-warp took each.
            constexpr Halves kSmallHalves = kRows < kFewRows ? kSplitsInTurns : kColumnsInTurns;
            merge_splits<T, 2, kSmallHalves>(params, shared, tile, consumer);
        }
    };
    run_block<kMode, Storage<kRows>, ConsumerState>(params, maps, init_barriers<kRows>, consume, merge);
}

template <typename T, int kRows>
Launchable launchable(const DecodeParams& params) {
    return {params.chunk_level > 0 ? decode_kernel<T, kRows, Mode::kBatchInvariant>
                                   : decode_kernel<T, kRows, Mode::kSplits>,
            sizeof(Storage<kRows>)};
}

template <typename T>
Launchable kernel_for(const DecodeParams& params) {
    constexpr int kHalf = kFewRows / 2;
    return params.kernel_rows == kHalf ? launchable<T, kHalf>(params) : launchable<T, kFewRows>(params);
}

}  // namespace
}  // namespace few_rows

Launchable few_rows_kernel(const DecodeParams& params) {
    return params.dtype == DType::kBFloat16 ? few_rows::kernel_for<__nv_bfloat16>(params)
                                            : few_rows::kernel_for<__half>(params);
}

}  // namespace mla

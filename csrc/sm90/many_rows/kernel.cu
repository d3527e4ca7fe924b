// Split-KV MLA decode for Hopper where many query rows share a KV head: one block of three warpgroups works
// on 64 of them and one part of the plan, and merges its share of what several parts worked on. Two consumers
// share the output's 512 columns; a producer keeps two pages of the cache arriving. Both products run on
// wgmma, with the query rows along its 64; pages come through the copy engine.
#include "../block.cuh"
#include "../kernels.h"
#include "chunks.cuh"

namespace mla {
namespace many_rows {

namespace {

__device__ void init_barriers(Storage& shared) {
    ptx::barrier_init(&shared.q_empty, kWarps);
    init_page_barriers(shared.pages);
    for (int stage = 0; stage < kStages; ++stage) {
        ptx::barrier_init(&shared.scored[stage], 1);
        ptx::barrier_init(&shared.weights_full[stage], kWarpgroup);
        ptx::barrier_init(&shared.end_full[stage], kWarpgroup);
    }
    ptx::fence_barrier_init();
}

template <typename T, Mode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodeMaps maps) {
    const auto consume = [&](Storage& shared, const RowTile& tile, const Split& split, int consumer,
                             ConsumerState& state) {
        if constexpr (kMode == Mode::kBatchInvariant) {
            consume_chunks<T>(params, shared, tile, split, consumer, state);
        } else {
            consume_split<T>(params, shared, tile, split, consumer, state);
        }
    };
    const auto merge = [&](Storage& shared, const RowTile& tile, int consumer) {
        if constexpr (kMode == Mode::kBatchInvariant) {
            merge_chunks<T, 16, 4, 4>(params, shared.plan, shared.phases, tile, consumer);
        } else {
            merge_splits<T, 4, kColumnsInTurns>(params, shared, tile, consumer);
        }
    };
    run_block<kMode, Storage, ConsumerState>(params, maps, init_barriers, consume, merge);
}

template <typename T>
DecodeKernel kernel_for(const DecodeParams& params) {
    return params.chunk_level > 0 ? decode_kernel<T, Mode::kBatchInvariant> : decode_kernel<T, Mode::kSplits>;
}

}  // namespace
}  // namespace many_rows

Launchable many_rows_kernel(const DecodeParams& params) {
    return {params.dtype == DType::kBFloat16 ? many_rows::kernel_for<__nv_bfloat16>(params)
                                             : many_rows::kernel_for<__half>(params),
            sizeof(many_rows::Storage)};
}

}  // namespace mla

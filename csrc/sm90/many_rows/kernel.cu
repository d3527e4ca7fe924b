// Split-KV MLA decode for Hopper where many query rows share a KV head: one block of three warpgroups works
// on 64 of them and one part of the plan, and merges its share of what several parts worked on. Two consumers
// share the output's 512 columns; a producer keeps two pages of the cache arriving. Both products run on
// wgmma, with the query rows along its 64; pages come through the copy engine.
#include "../kernels.h"
#include "../loader.cuh"
#include "consumers.cuh"

namespace mla {
namespace many_rows {
namespace {

__device__ void init_barriers(Storage& shared) {
    ptx::barrier_init(&shared.q_empty, kWarps);
    init_page_barriers(shared.pages);
    for (int stage = 0; stage < kStages; ++stage) {
        ptx::barrier_init(&shared.weights_full[stage], kWarpgroup);
        ptx::barrier_init(&shared.normalizer_full[stage], kWarpgroup);
    }
    ptx::fence_barrier_init();
}

template <typename T, Mode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodeMaps maps) {
    extern __shared__ __align__(kSwizzleAtomBytes) uint8_t shared_memory[];
    Storage& shared = *reinterpret_cast<Storage*>(shared_memory);
    const RowTile tile(params, params.first_row_tile + blockIdx.x);
    const int thread = threadIdx.x, warpgroup = ptx::uniform(thread / kWarpgroup);
    if (thread == 0) {
        shared.plan = params.parts[part_of_block(params)];
    } else if (thread == kWarpgroup) {
        if (ptx::smem_address(shared_memory) % kSwizzleAtomBytes != 0) __trap();  // swizzles count from there
        init_barriers(shared);
    } else if (thread == 2 * kWarpgroup) {
        prefetch_maps(maps);
    }
    __syncthreads();

    if (warpgroup == kConsumers) {
        ptx::give_registers<kProducerRegisters>();
        if (thread != 2 * kWarpgroup) return;
        Loader<Storage> loader(params, maps, shared);
        for_each_split<kMode>(params, shared.plan, tile,
                              [&](const Split& split) { loader.load(tile, split); });
        return;
    }
    ptx::take_registers<kConsumerRegisters>();
    ConsumerState state;
    for_each_split<kMode>(params, shared.plan, tile, [&](const Split& split) {
        consume<T, kMode>(params, shared, tile, split, warpgroup, state);
    });
    if constexpr (kMode == Mode::kBatchInvariant) {
        merge_chunks<T>(params, shared.plan, shared.tickets, tile, warpgroup);
    } else {
        merge_splits<T, 4>(params, shared.plan, shared.tickets, tile, warpgroup,
                           shared.merge_scratch(warpgroup),
                           [&](const SplitPlace& place) { return is_exchange(params, shared.plan, place); });
    }
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

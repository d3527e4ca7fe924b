// Split-KV MLA decode for Hopper where few query rows share a KV head: one block of three warpgroups works on
// all of them and one part of the plan, and merges its share of what several parts worked on. The products
// are transposed: keys, or columns of V, lie along wgmma's 64, the 16 or 32 rows along its narrow side, so
// that little is multiplied in vain and a query, an output and the code that handles them are small.
#include "../kernels.h"
#include "../loader.cuh"
#include "consumers.cuh"

namespace mla {
namespace few_rows {
namespace {

template <int kRows>
__device__ void init_barriers(Storage<kRows>& shared) {
    ptx::barrier_init(&shared.q_full, 1);
    ptx::barrier_init(&shared.q_empty, kConsumers * kWarps);
    init_page_barriers(shared.pages);
    ptx::fence_barrier_init();
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodeMaps maps) {
    extern __shared__ __align__(kSwizzleAtomBytes) uint8_t shared_memory[];
    auto& shared = *reinterpret_cast<Storage<kRows>*>(shared_memory);
    const RowTile tile(params, params.first_row_tile + blockIdx.x);
    const int thread = threadIdx.x, warpgroup = ptx::uniform(thread / kWarpgroup);
    if (thread == 0) {
        shared.plan = params.parts[part_of_block(params)];
    } else if (thread == 2 * kWarpgroup) {
        if (ptx::smem_address(shared_memory) % kSwizzleAtomBytes != 0) __trap();  // swizzles count from there
        prefetch_maps(maps);
        init_barriers(shared);
    }
    __syncthreads();

    if (warpgroup == kConsumers) {
        ptx::give_registers<kProducerRegisters>();
        if (thread != 2 * kWarpgroup) return;
        Loader<Storage<kRows>> loader(params, maps, shared);
        for_each_split<Mode::kSplits>(params, shared.plan, tile,
                                      [&](const Split& split) { loader.load(tile, split); });
        return;
    }
    ptx::take_registers<kConsumerRegisters>();
    ConsumerState state;
    for_each_split<Mode::kSplits>(params, shared.plan, tile, [&](const Split& split) {
        consume<T, kRows>(params, shared, tile, split, warpgroup, state);
    });
    merge_splits<T, 2>(params, shared.plan, shared.tickets, tile, warpgroup, shared.merge_scratch(warpgroup),
                       [](const SplitPlace&) { return false; });
}

template <typename T>
Launchable kernel_for(const DecodeParams& params) {
    constexpr int kHalf = kFewRows / 2;
    if (params.query_len * params.heads_per_group <= kHalf)
        return {decode_kernel<T, kHalf>, sizeof(Storage<kHalf>)};
    return {decode_kernel<T, kFewRows>, sizeof(Storage<kFewRows>)};
}

}  // namespace
}  // namespace few_rows

Launchable few_rows_kernel(const DecodeParams& params) {
    return params.dtype == DType::kBFloat16 ? few_rows::kernel_for<__nv_bfloat16>(params)
                                            : few_rows::kernel_for<__half>(params);
}

}  // namespace mla

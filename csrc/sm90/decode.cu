// Split-KV MLA decode for Hopper: one block of three warpgroups works on 64 query rows of one KV head and one
// part of the plan, and merges its share of what several parts worked on. Two consumers share the output's
// 512 columns; a producer keeps two pages of the cache arriving. Both products run on wgmma, pages come
// through the copy engine.
#include <algorithm>
#include <atomic>

#include "../cuda_check.h"
#include "arrivals.cuh"
#include "consumers.cuh"
#include "loader.cuh"
#include "merge.cuh"

namespace mla {
namespace {

// Registers a thread: a consumer has 128 accumulators, 32 scores and 16 weights. 3 x 128 threads share
// 65,536.
constexpr int kConsumerRegisters = 224;
constexpr int kProducerRegisters = 56;

__device__ void init_barriers(SharedStorage& shared) {
    constexpr int kWarps = kWarpgroup / 32;
    ptx::barrier_init(&shared.q_empty, kWarps);
    for (int stage = 0; stage < kStages; ++stage) {
        for (int tile = 0; tile < kTiles; ++tile) ptx::barrier_init(&shared.k_full[stage][tile], 1);
        for (int group = 0; group < kTileGroups; ++group)
            ptx::barrier_init(&shared.k_empty[stage][group], kWarps);
        ptx::barrier_init(&shared.weights_full[stage], kWarpgroup);
        ptx::barrier_init(&shared.normalizer_full[stage], kWarpgroup);
    }
    ptx::fence_barrier_init();
}

template <typename T, Mode kMode>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ DecodeMaps maps) {
    extern __shared__ __align__(kSwizzleAtomBytes) uint8_t shared_memory[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_memory);
    const RowTile tile(params, params.first_row_tile + blockIdx.x);
    const int thread = threadIdx.x, warpgroup = ptx::uniform(thread / kWarpgroup);
    if (thread == 0) {
        shared.plan = params.parts[blockIdx.y];
    } else if (thread == kWarpgroup) {
        if (ptx::smem_address(shared_memory) % kSwizzleAtomBytes != 0) __trap();  // swizzles count from there
        init_barriers(shared);
    } else if (thread == 2 * kWarpgroup) {
        ptx::prefetch_map(maps.k);
        ptx::prefetch_map(maps.q_nope);
        ptx::prefetch_map(maps.q_pe);
    }
    __syncthreads();

    if (warpgroup == kConsumers) {
        ptx::give_registers<kProducerRegisters>();
        if (thread != 2 * kWarpgroup) return;
        Loader loader(params, maps, shared);
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
        merge_chunks<T>(params, shared, tile, warpgroup);
    } else {
        merge_splits<T, kMode>(params, shared, tile, warpgroup);
    }
}

using Kernel = void (*)(DecodeParams, DecodeMaps);

// By shapes alone: a captured graph is replayed with other lengths.
template <typename T>
Kernel kernel_for(const DecodeParams& params) {
    constexpr int kFewRows = 32;
    if (params.chunk_level > 0) return decode_kernel<T, Mode::kBatchInvariant>;
    return params.query_len * params.heads_per_group <= kFewRows ? decode_kernel<T, Mode::kFewRows>
                                                                 : decode_kernel<T, Mode::kManyRows>;
}

void launch(const DecodeParams& params, const DecodeMaps& maps, int tiles, cudaStream_t stream) {
    const Kernel kernel =
        params.dtype == DType::kBFloat16 ? kernel_for<__nv_bfloat16>(params) : kernel_for<__half>(params);
    // Each launch, for it holds for the current device only; it costs less than a microsecond.
    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedStorage)));
    cudaLaunchAttribute cooperative;
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(tiles, params.num_parts);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = sizeof(SharedStorage);
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = params.num_parts > 1;  // one part splits nothing, and waits for nothing
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params, maps));
}

}  // namespace

void launch_decode(const DecodeParams& params, const DecodeMaps& maps, cudaStream_t stream) {
    static std::atomic<unsigned> launches{0};
    int device, sms;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    // Blocks that wait for each other run at the same time, one on an SM. Rows whose padding takes more tiles
    // than the plan reckoned with are left to further launches.
    const int tiles_at_once = params.num_parts == 1
                                  ? params.num_row_tiles
                                  : std::max(1, std::min(sms, kMaxBlocks) / params.num_parts);
    DecodeParams launched = params;
    for (int first = 0; first < params.num_row_tiles; first += tiles_at_once) {
        const int tiles = std::min(tiles_at_once, params.num_row_tiles - first);
        launched.first_row_tile = first;
        launched.arrivals_slot = launches++ % kArrivalsSlots;
        launch(launched, maps, tiles, stream);
    }
}

}  // namespace mla

// Split-KV MLA decode for Hopper: one block of three warpgroups works on 64 query rows of one KV head and one
// part of the plan. Two consumers share the output's 512 columns; a producer keeps two pages of the cache
// arriving. Both products run on wgmma, pages come through the copy engine.
#include "../cuda_check.h"
#include "consumers.cuh"
#include "loader.cuh"

namespace mla {
namespace {

// Registers a thread: a consumer has 128 accumulators, 32 scores and 16 weights. 3 x 128 threads share
// 65,536.
constexpr int kConsumerRegisters = 224;
constexpr int kProducerRegisters = 56;

__device__ void init_barriers(SharedStorage& shared) {
    constexpr int kWarps = kWarpgroup / 32;
    ptx::barrier_init(&shared.q_full, kQueryLoaders);
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

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params, const __grid_constant__ CUtensorMap k_map) {
    extern __shared__ __align__(kSwizzleAtomBytes) uint8_t shared_memory[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_memory);
    const RowTile tile(params, blockIdx.x);
    const int part = blockIdx.y;
    if (threadIdx.x == 0) {
        if (ptx::smem_address(shared_memory) % kSwizzleAtomBytes != 0) __trap();  // swizzles count from there
        init_barriers(shared);
    }
    __syncthreads();

    if (threadIdx.x < kWarpgroup) {
        ptx::take_registers<kConsumerRegisters>();
        consume_scores_and_left<T>(params, shared, part, tile);
    } else if (threadIdx.x < 2 * kWarpgroup) {
        ptx::take_registers<kConsumerRegisters>();
        consume_right<T>(params, shared, part, tile);
    } else {
        ptx::give_registers<kProducerRegisters>();
        if (threadIdx.x < kThreads - kQueryLoaders) {
            load_pages(params, k_map, shared, part, tile.kv_head);
        } else {
            load_queries<T>(params, shared, part, tile);
        }
    }
}

template <typename T>
void launch(const DecodeParams& params, const CUtensorMap& k_map, cudaStream_t stream) {
    // Each launch, for it holds for the current device only; it costs less than a microsecond.
    CUDA_CHECK(cudaFuncSetAttribute(decode_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    sizeof(SharedStorage)));
    const int rows = params.query_len * (params.num_heads / params.num_kv_heads);
    const int row_tiles = (rows + kTileRows - 1) / kTileRows;
    const dim3 grid(row_tiles * params.num_kv_heads, params.num_parts);
    decode_kernel<T><<<grid, kThreads, sizeof(SharedStorage), stream>>>(params, k_map);
    CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_decode(const DecodeParams& params, const CUtensorMap& k_map, cudaStream_t stream) {
    if (params.dtype == DType::kBFloat16) {
        launch<__nv_bfloat16>(params, k_map, stream);
    } else {
        launch<__half>(params, k_map, stream);
    }
}

}  // namespace mla

// Launches decode: which kernel, and how many of its blocks at once.
#include <algorithm>
#include <atomic>

#include "../cuda_check.h"
#include "kernels.h"
#include "tiles.cuh"

namespace mla {
namespace {

void launch(const DecodeParams& params, const DecodeMaps& maps, int tiles, int sms, cudaStream_t stream) {
    const auto [kernel, shared_bytes] =
        params.kernel_rows < kTileRows ? few_rows_kernel(params) : many_rows_kernel(params);
    // Each launch, for it holds for the current device only; it costs less than a microsecond.
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    // Two blocks that read the same pages start together, on the two SMs of a TPC, if each has two.
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {2, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(tiles, params.num_parts);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    const bool in_pairs = tiles == 2 && params.num_kv_heads == 1 && sms % 2 == 0;
    // One part splits nothing, and waits for nothing.
    config.numAttrs = params.num_parts == 1 ? 0 : in_pairs ? 2 : 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params, maps));
}

}  // namespace

void launch_decode(const DecodeParams& params, const DecodeMaps& maps, cudaStream_t stream) {
    static std::atomic<unsigned> launches{0};
    int device, sms;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    // Blocks that wait for each other run at the same time, one on an SM. Where rows take more tiles than
    // the plan reckoned with, these are left to further launches.
    const int tiles_at_once = params.num_parts == 1
                                  ? params.num_row_tiles
                                  : std::max(1, std::min(sms, kMaxBlocks) / params.num_parts);
    DecodeParams launched = params;
    for (int first = 0; first < params.num_row_tiles; first += tiles_at_once) {
        const int tiles = std::min(tiles_at_once, params.num_row_tiles - first);
        launched.first_row_tile = first;
        launched.arrivals_slot = launches++ % kArrivalsSlots;
        launch(launched, maps, tiles, sms, stream);
    }
}

}  // namespace mla

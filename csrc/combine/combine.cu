// Merge of a sequence's splits: out = sum_i w_i out_i with w_i = exp(lse_i - lse), lse = log sum_i
// exp(lse_i).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../cuda_check.h"
#include "../params.h"

namespace mla {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kUnroll = 8;          // partial rows in flight
constexpr int kSliceColumns = 128;  // of a row, for one warp: a float4 a lane
constexpr int kSlices = kHeadDimV / kSliceColumns;

__device__ void store(__nv_bfloat16* out, float4 v) {
    auto* pair = reinterpret_cast<__nv_bfloat162*>(out);
    pair[0] = __floats2bfloat162_rn(v.x, v.y);
    pair[1] = __floats2bfloat162_rn(v.z, v.w);
}

__device__ void store(__half* out, float4 v) {
    auto* pair = reinterpret_cast<__half2*>(out);
    pair[0] = __floats2half2_rn(v.x, v.y);
    pair[1] = __floats2half2_rn(v.z, v.w);
}

__device__ void add(float4& sum, float weight, float4 value) {
    sum.x += weight * value.x;
    sum.y += weight * value.y;
    sum.z += weight * value.z;
    sum.w += weight * value.w;
}

// Log-sum-exp over the splits of a row; -inf where no split saw a key. The whole warp shares the work.
__device__ float merge_lse(const float* lse_partial, int splits, int64_t stride) {
    const int lane = threadIdx.x % 32;
    float largest = -INFINITY, sum = 0.f;
    for (int i = lane; i < splits; i += 32) largest = fmaxf(largest, lse_partial[i * stride]);
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (largest == -INFINITY) return largest;
    for (int i = lane; i < splits; i += 32) sum += expf(lse_partial[i * stride] - largest);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return largest + logf(sum);
}

// One warp's slice of a row, over splits first, first + step, ...; kUnroll loads are in flight at once.
__device__ float4 weighted_sum(const float4* partial, const float* lse_partial, int splits, int64_t stride,
                               float lse, int first, int step) {
    const int64_t value_stride = stride * (kHeadDimV / 4);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int begin = first; begin < splits; begin += kUnroll * step) {
        float4 value[kUnroll];
        float weight[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int split = begin + i * step;
            if (split >= splits) break;
            value[i] = partial[split * value_stride];
            weight[i] = lse_partial[split * stride];
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (begin + i * step < splits) add(sum, expf(weight[i] - lse), value[i]);
    }
    return sum;
}

// Blocks (x, part): of each sequence that is split, the part with its second split stands for it. kGroup
// warps share the splits of one slice of a row: 1 where sequences have few splits, all 8 where they have
// many.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ DecodeParams params) {
    __shared__ float4 group_sum[kWarps][32];
    const PartPlan plan = params.parts[blockIdx.y];
    const int seq = plan.first_seq;
    // Before anything may return: a grid that ends early must not let the next one overtake the decode
    // kernel.
    cudaGridDependencySynchronize();
    if (plan.first_split != 1) return;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slice_of_rows = blockIdx.x * (kWarps / kGroup) + warp / kGroup;
    const int row = slice_of_rows / kSlices;  // query token * h_q + head
    const int column = slice_of_rows % kSlices * kSliceColumns + lane * 4;
    const int rows = params.query_len * params.num_heads;
    if (row >= rows) return;

    const int first_slot = params.num_splits[seq];
    const int splits = params.num_splits[seq + 1] - first_slot;
    const int64_t first_row = static_cast<int64_t>(first_slot) * rows + row;
    const float* lse_partial = params.lse_partial + first_row;
    const auto* partial =
        reinterpret_cast<const float4*>(params.out_partial + first_row * kHeadDimV + column);

    const float lse = merge_lse(lse_partial, splits, rows);
    const bool empty = lse == -INFINITY;
    float4 sum = weighted_sum(partial, lse_partial, splits, rows, empty ? 0.f : lse, warp % kGroup, kGroup);
    if constexpr (kGroup > 1) {
        group_sum[warp][lane] = sum;
        __syncthreads();
        if (warp % kGroup != 0) return;
        for (int i = 1; i < kGroup; ++i) add(sum, 1.f, group_sum[warp + i][lane]);
    }

    const int token = row / params.num_heads, head = row % params.num_heads;
    T* out = static_cast<T*>(params.out) + seq * params.out_stride[0] + token * params.out_stride[1] +
             head * params.out_stride[2];
    store(out + column, sum);
    if (column == 0) {
        params.lse[seq * params.lse_stride[0] + head * params.lse_stride[1] + token * params.lse_stride[2]] =
            empty ? INFINITY : lse;
    }
}

template <typename T, int kGroup>
void launch(const DecodeParams& params, cudaStream_t stream) {
    const int slices = params.query_len * params.num_heads * kSlices;
    constexpr int kSlicesPerBlock = kWarps / kGroup;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    const cudaLaunchConfig_t config{
        .gridDim = dim3((slices + kSlicesPerBlock - 1) / kSlicesPerBlock, params.num_parts),
        .blockDim = dim3(kThreads),
        .dynamicSmemBytes = 0,
        .stream = stream,
        .attrs = &overlap,
        .numAttrs = 1,
    };
    CUDA_CHECK(cudaLaunchKernelEx(&config, combine_kernel<T, kGroup>, params));
}

template <typename T>
void launch(const DecodeParams& params, cudaStream_t stream) {
    if (params.num_parts >= 4 * params.batch) {
        launch<T, kWarps>(params, stream);
    } else {
        launch<T, 1>(params, stream);
    }
}

}  // namespace

void launch_combine(const DecodeParams& params, cudaStream_t stream) {
    if (params.dtype == DType::kBFloat16) {
        launch<__nv_bfloat16>(params, stream);
    } else {
        launch<__half>(params, stream);
    }
}

}  // namespace mla

// Merge of a sequence's splits: out = sum_i w_i out_i with w_i = exp(lse_i - lse), lse = log sum_i
// exp(lse_i).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../cuda_check.h"
#include "../params.h"

namespace mla {
namespace {

constexpr int kUnroll = 8;          // partial rows in flight
constexpr int kSliceColumns = 128;  // of a row, for one warp: a float4 a lane
constexpr int kSlices = kHeadDimV / kSliceColumns;
constexpr int kWideGroups = 8;  // warps that share the splits of a slice
constexpr int kWideRows = 128;  // beyond them, narrow blocks fill the machine

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

// A slice of a row in all splits.
struct Slice {
    const float4* partial;     // this lane's columns of split 0
    const float* lse_partial;  // of split 0
    int64_t rows;              // from one split to the next
    int splits;

    // Splits first, first + step, ...: kUnroll of them.
    __device__ void load(float4 (&value)[kUnroll], int first, int step) const {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (first + i * step < splits) value[i] = partial[(first + i * step) * rows * (kHeadDimV / 4)];
    }

    __device__ void accumulate(float4& sum, const float4 (&value)[kUnroll], float lse, int first,
                               int step) const {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int split = first + i * step;
            if (split < splits) add(sum, expf(lse_partial[split * rows] - lse), value[i]);
        }
    }
};

// Block x merges one row of a sequence in the plan's merge list. Where sequences have few splits, four warps
// take a slice of the row each; where they have many and rows are few (kGroups > 1), block (x, slice) merges
// one slice, and its warps share the splits.
template <typename T, int kGroups>
__global__ void __launch_bounds__(32 * (kGroups == 1 ? kSlices : kGroups))
    combine_kernel(const __grid_constant__ DecodeParams params) {
    const int rows = params.query_len * params.num_heads;
    const PartPlan& merge = params.parts[blockIdx.x / rows];
    // Past the list's end; or the plan is not of this call (work.cuh).
    if (merge.merge_seq < 0 || merge.merge_seq >= params.batch || merge.merge_first_slot < 0 ||
        merge.merge_first_slot + merge.merge_splits > params.batch + params.num_parts)
        return;
    const int row = blockIdx.x % rows;  // query token * h_q + head
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = kGroups == 1 ? 0 : warp;
    const int column = (kGroups == 1 ? warp : blockIdx.y) * kSliceColumns + lane * 4;
    const int64_t first_row = static_cast<int64_t>(merge.merge_first_slot) * rows + row;
    const Slice slice{reinterpret_cast<const float4*>(params.out_partial + first_row * kHeadDimV + column),
                      params.lse_partial + first_row, rows, merge.merge_splits};

    float4 value[kUnroll];
    slice.load(value, group, kGroups);  // before the weights are known: both take a trip to L2
    const float lse = merge_lse(slice.lse_partial, slice.splits, rows);
    const float offset = lse == -INFINITY ? 0.f : lse;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    slice.accumulate(sum, value, offset, group, kGroups);
    for (int first = group + kUnroll * kGroups; first < slice.splits; first += kUnroll * kGroups) {
        slice.load(value, first, kGroups);
        slice.accumulate(sum, value, offset, first, kGroups);
    }
    if constexpr (kGroups > 1) {
        __shared__ float4 group_sum[kGroups][32];
        group_sum[group][lane] = sum;
        __syncthreads();
        if (group != 0) return;
        for (int i = 1; i < kGroups; ++i) add(sum, 1.f, group_sum[i][lane]);
    }

    const int token = row / params.num_heads, head = row % params.num_heads;
    T* out = static_cast<T*>(params.out) + merge.merge_seq * params.out_stride[0] +
             token * params.out_stride[1] + head * params.out_stride[2];
    store(out + column, sum);
    if (column == 0) {
        params.lse[merge.merge_seq * params.lse_stride[0] + head * params.lse_stride[1] +
                   token * params.lse_stride[2]] = lse == -INFINITY ? INFINITY : lse;
    }
}

template <typename T>
void launch(const DecodeParams& params, cudaStream_t stream) {
    const int merges = std::min(params.batch, params.num_parts - 1);  // at most one cut a part
    const int rows = merges * params.query_len * params.num_heads;
    if (rows == 0) return;
    // Shapes decide, never lengths: a captured graph is replayed with others.
    const bool wide = params.num_parts >= 2 * kWideGroups * params.batch && rows <= kWideRows;
    if (wide) {
        combine_kernel<T, kWideGroups><<<dim3(rows, kSlices), 32 * kWideGroups, 0, stream>>>(params);
    } else {
        combine_kernel<T, 1><<<rows, 32 * kSlices, 0, stream>>>(params);
    }
    CUDA_CHECK(cudaGetLastError());
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

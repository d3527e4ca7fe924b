// Sums over the threads of a block of one warp or more.
#pragma once

namespace mla {

// Replaces each value with its sum over the block.
template <int kWarps, int N>
__device__ inline void block_sum(unsigned (&value)[N]) {
    __shared__ unsigned of_warp[kWarps][N];
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = __reduce_add_sync(~0u, value[i]);
    if constexpr (kWarps > 1) {
        __syncthreads();  // the sums of an earlier call are read
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (lane == 0) of_warp[threadIdx.x / 32][i] = value[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] = __reduce_add_sync(~0u, lane < kWarps ? of_warp[lane][i] : 0);
    }
}

// Replaces each value with the sum over `carry` and the threads before; carry grows by the block's sum.
// Threads from `count` on have zeros. A barrier must lie between two calls.
template <int kWarps, int N>
__device__ inline void block_scan(unsigned (&value)[N], unsigned (&carry)[N], unsigned count) {
    __shared__ unsigned of_warp[kWarps][N];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned sum[N];  // of the warp, then of the block
#pragma unroll
    for (int i = 0; i < N; ++i) {
        sum[i] = __reduce_add_sync(~0u, value[i]);
        if (kWarps > 1 && lane == 0) of_warp[warp][i] = sum[i];
    }
    unsigned inclusive[N];
#pragma unroll
    for (int i = 0; i < N; ++i) inclusive[i] = value[i];
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
        if (step >= count) break;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const unsigned below = __shfl_up_sync(~0u, inclusive[i], step);
            if (lane >= step) inclusive[i] += below;
        }
    }
    if constexpr (kWarps > 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        value[i] = carry[i] + inclusive[i] - value[i];
        if constexpr (kWarps > 1) {
            const unsigned other = lane < kWarps ? of_warp[lane][i] : 0;
            value[i] += __reduce_add_sync(~0u, lane < warp ? other : 0);
            sum[i] = __reduce_add_sync(~0u, other);
        }
        carry[i] += sum[i];
    }
}

}  // namespace mla

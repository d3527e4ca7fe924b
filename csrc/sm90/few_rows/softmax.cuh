// Online softmax over the scores of 64 keys x kRows query rows as wgmma leaves them in registers.
//
// A thread holds two keys, 8 apart, of kRows / 4 rows: element 4 i + 2 h + e of `scores` is of key
// 16 warp + lane / 4 + 8 h and of row 8 i + 2 (lane % 4) + e. So a row's 64 scores lie in 8 lanes of each of
// the four warps. What is held for each of the thread's rows has the index 2 i + e; the output has the same
// rows in the same threads.
#pragma once

#include <cmath>

#include "../numbers.cuh"
#include "../ptx.cuh"
#include "../tiles.cuh"

namespace mla::few_rows {

// The row of the thread's value 2 i + e; the next one is that of 2 i + 1.
__device__ inline int row_of_value(int value) {
    return value / 2 * 8 + threadIdx.x % 4 * 2 + value % 2;
}

// Over the 8 lanes that hold the same rows.
template <typename Op>
__device__ inline float reduce_lanes(float value, Op op) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) value = op(value, __shfl_xor_sync(~0u, value, mask));
    return value;
}

template <int kRows>
class OnlineSoftmax {
  public:
    static constexpr int kValues = kRows / 4;  // rows of a thread
    using OfWarps = float[kWarps][kRows];

    __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2_(softmax_scale * kLog2E) {
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
            max_[v] = -INFINITY;
            sum_[v] = 0.f;
        }
    }

    // Turns scores into weights relative to the stored maximum; `rescale` says by how much to scale what was
    // summed so far. The warpgroup's warps meet here once.
    __device__ void update(float (&scores)[2 * kValues], float (&rescale)[kValues], OfWarps& page_max,
                           int consumer) {
        const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int v = 0; v < kValues; v += 2) {
            const auto max = [](float a, float b) { return fmaxf(a, b); };
            const float2 of_warp =
                make_float2(reduce_lanes(fmaxf(scores[2 * v], scores[2 * v + 2]), max),
                            reduce_lanes(fmaxf(scores[2 * v + 1], scores[2 * v + 3]), max));
            if (lane < 4) *reinterpret_cast<float2*>(&page_max[warp][row_of_value(v)]) = of_warp;
        }
        sync_warpgroup(consumer);
#pragma unroll
        for (int v = 0; v < kValues; v += 2) {
            float2 max = make_float2(-INFINITY, -INFINITY);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float2 other = *reinterpret_cast<const float2*>(&page_max[w][row_of_value(v)]);
                max = make_float2(fmaxf(max.x, other.x), fmaxf(max.y, other.y));
            }
            rescale[v] = weigh(v, max.x * scale_log2_, scores[2 * v], scores[2 * v + 2]);
            rescale[v + 1] = weigh(v + 1, max.y * scale_log2_, scores[2 * v + 1], scores[2 * v + 3]);
        }
    }

    // Hands over what RowTotal needs of this consumer, after its last page. Both consumers meet behind it.
    __device__ void publish(float (&sum)[kRows][kWarps], float (&max)[kRows][kConsumers],
                            int consumer) const {
        const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
            const float of_warp = reduce_lanes(sum_[v], [](float a, float b) { return a + b; });
            if (lane < 4) sum[row_of_value(v)][warp] = of_warp;
            if (lane < 4 && warp == 0) max[row_of_value(v)][consumer] = max_[v];
        }
    }

  private:
    // Two scores of a row to weights; by how much to scale what was summed so far.
    __device__ float weigh(int v, float page_max, float& first, float& second) {
        float rescale = 1.f;
        if (page_max > max_[v] + kSlack) {
            rescale = ptx::exp2_approx(max_[v] - page_max);  // 0 at the first page: max_ is -inf
            max_[v] = page_max;
        }
        const float offset = max_[v] == -INFINITY ? 0.f : max_[v];  // no key seen yet: weights 0, not NaN
        first = ptx::exp2_approx(fmaf(first, scale_log2_, -offset));
        second = ptx::exp2_approx(fmaf(second, scale_log2_, -offset));
        sum_[v] = sum_[v] * rescale + (first + second);
        return rescale;
    }

    float scale_log2_;
    float max_[kValues];  // stored maximum, in units of log2
    float sum_[kValues];  // of this thread's keys
};

}  // namespace mla::few_rows

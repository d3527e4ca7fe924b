// Online softmax over the scores of 64 keys x kRows query rows as wgmma leaves them in registers. Two
// consumers share it: they score a split's pages in turns, and each follows the other's maxima.
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

// Where the value's first score is; its second is 2 further.
__device__ constexpr int first_score(int value) {
    return value / 2 * 4 + value % 2;
}

// Over the 8 lanes that hold the same rows.
template <typename Op>
__device__ inline float reduce_lanes(float value, Op op) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) value = op(value, __shfl_xor_sync(~0u, value, mask));
    return value;
}

template <typename T, int kRows>
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

    // Whether a score outgrows its row's stored maximum.
    __device__ bool is_outgrown(const float (&scores)[2 * kValues]) const {
        bool outgrown = false;
#pragma unroll
        for (int v = 0; v < kValues; ++v) outgrown |= largest(scores, v) > max_[v] + kLargest<T>;
        return outgrown;
    }

    // Raises the stored maxima to a page's where these outgrow them; `rescale` says by how much to scale what
    // was summed so far. The warpgroup's warps meet here.
    __device__ void raise(const float (&scores)[2 * kValues], OfWarps& page_max, int consumer,
                          float (&rescale)[kValues]) {
        const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int v = 0; v < kValues; v += 2) {
            const auto larger = [](float a, float b) { return fmaxf(a, b); };
            const float2 of_warp = make_float2(reduce_lanes(largest(scores, v), larger),
                                               reduce_lanes(largest(scores, v + 1), larger));
            if (lane < 4) *reinterpret_cast<float2*>(&page_max[warp][row_of_value(v)]) = of_warp;
        }
        sync_warpgroup(consumer);
#pragma unroll
        for (int v = 0; v < kValues; v += 2) {
            float2 max = make_float2(-INFINITY, -INFINITY);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float2 of_warp = *reinterpret_cast<const float2*>(&page_max[w][row_of_value(v)]);
                max = make_float2(fmaxf(max.x, of_warp.x), fmaxf(max.y, of_warp.y));
            }
            rescale[v] = raise_to(v, lifted(max.x, max_[v]));
            rescale[v + 1] = raise_to(v + 1, lifted(max.y, max_[v + 1]));
        }
    }

    // Turns scores into weights relative to the stored maxima, which go to `max` for both consumers.
    __device__ void weigh(float (&scores)[2 * kValues], float (&max)[kRows]) {
        if (threadIdx.x % kWarpgroup < 4)
#pragma unroll
            for (int v = 0; v < kValues; v += 2)
                *reinterpret_cast<float2*>(&max[row_of_value(v)]) = make_float2(max_[v], max_[v + 1]);
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
            const float offset = max_[v] == -INFINITY ? 0.f : max_[v];  // no key seen yet: weights 0, not NaN
            float& first = scores[first_score(v)];
            float& second = scores[first_score(v) + 2];
            first = ptx::exp2_approx(fmaf(first, scale_log2_, -offset));
            second = ptx::exp2_approx(fmaf(second, scale_log2_, -offset));
            sum_[v] += first + second;
        }
    }

    // Before the output of a page with which the other consumer has raised the maxima.
    __device__ void follow(const float (&max)[kRows], float (&rescale)[kValues]) {
#pragma unroll
        for (int v = 0; v < kValues; v += 2) {
            const float2 of_other = *reinterpret_cast<const float2*>(&max[row_of_value(v)]);
            rescale[v] = raise_to(v, of_other.x);
            rescale[v + 1] = raise_to(v + 1, of_other.y);
        }
    }

    // Hands over this consumer's sums, after its last page. Both consumers meet behind it.
    __device__ void publish(float (&sum)[kRows][kWarps]) const {
        const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
            const float of_warp = reduce_lanes(sum_[v], [](float a, float b) { return a + b; });
            if (lane < 4) sum[row_of_value(v)][warp] = of_warp;
        }
    }

  private:
    // What is stored once a page with this maximum is known.
    __device__ static float lifted(float of_page, float stored) {
        return of_page > stored + kLargest<T> ? of_page - kLift<T> : stored;
    }

    __device__ float largest(const float (&scores)[2 * kValues], int v) const {
        return fmaxf(scores[first_score(v)], scores[first_score(v) + 2]) * scale_log2_;
    }

    // By how much to scale what was summed so far; 0 at the first page: max_ is -inf.
    __device__ float raise_to(int v, float max) {
        const float rescale = max == max_[v] ? 1.f : ptx::exp2_approx(max_[v] - max);
        max_[v] = max;
        sum_[v] *= rescale;
        return rescale;
    }

    float scale_log2_;
    float max_[kValues];  // stored maximum less the lift, in units of log2
    float sum_[kValues];  // of this thread's keys
};

}  // namespace mla::few_rows

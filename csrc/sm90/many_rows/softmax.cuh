// Online softmax over the scores of a 64 x 64 tile as wgmma leaves them in registers.
//
// A thread holds two rows, 8 apart; a row's 64 scores lie in the four threads of a quad. Element
// 4 i + 2 h + e of `scores` is column 8 i + 2 (lane % 4) + e of row half h.
#pragma once

#include "../numbers.cuh"
#include "../ptx.cuh"

namespace mla::many_rows {

template <typename Op>
__device__ inline float quad_reduce(float value, Op op) {
    value = op(value, __shfl_xor_sync(~0u, value, 1));
    return op(value, __shfl_xor_sync(~0u, value, 2));
}

// Keys at and past visible[h] get no weight, by selection: the score may be NaN.
__device__ inline void mask_scores(float (&scores)[32], int first_key, const int (&visible)[2]) {
    const int first_column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int key = first_column + i / 4 * 8 + i % 2;
        if (key >= visible[i / 2 % 2]) scores[i] = -INFINITY;
    }
}

// What ends a split, for a thread's two rows.
struct SplitEnd {
    float2 scale = make_float2(0.f, 0.f);            // by what to scale the output
    float2 lse = make_float2(-INFINITY, -INFINITY);  // -inf where a row saw no key
};

class OnlineSoftmax {
  public:
    __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2_(softmax_scale * kLog2E) {}

    // Turns scores into weights relative to the stored maximum; returns by how much to scale what was summed
    // so far.
    __device__ float2 update(float (&scores)[32]) {
        float rescale[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float tile_max = -INFINITY;
#pragma unroll
            for (int i = 0; i < 32; ++i)
                if (i / 2 % 2 == h) tile_max = fmaxf(tile_max, scores[i]);
            tile_max = quad_reduce(tile_max, [](float a, float b) { return fmaxf(a, b); }) * scale_log2_;
            rescale[h] = 1.f;
            if (tile_max > max_[h] + kSlack) {
                rescale[h] = ptx::exp2_approx(max_[h] - tile_max);  // 0 at the first page: max_ is -inf
                max_[h] = tile_max;
            }
            const float offset = max_[h] == -INFINITY ? 0.f : max_[h];  // no key seen yet: weights 0, not NaN
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                if (i / 2 % 2 != h) continue;
                scores[i] = ptx::exp2_approx(fmaf(scores[i], scale_log2_, -offset));
                sum += scores[i];
            }
            sum_[h] = sum_[h] * rescale[h] + sum;
        }
        return make_float2(rescale[0], rescale[1]);
    }

    // Closes the sum over the quad, after the last page.
    __device__ SplitEnd finish() {
#pragma unroll
        for (int h = 0; h < 2; ++h) sum_[h] = quad_reduce(sum_[h], [](float a, float b) { return a + b; });
        return {make_float2(inverse(0), inverse(1)), make_float2(log_sum_exp(0), log_sum_exp(1))};
    }

  private:
    __device__ float inverse(int h) const { return ptx::inverse_or_zero(sum_[h]); }
    __device__ float log_sum_exp(int h) const {
        return sum_[h] == 0.f ? -INFINITY : max_[h] * kLn2 + __logf(sum_[h]);
    }

    float scale_log2_;
    float max_[2] = {-INFINITY, -INFINITY};  // stored maximum, in units of log2
    float sum_[2] = {0.f, 0.f};              // of this thread's columns until finish()
};

}  // namespace mla::many_rows

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

    // Closes the sum over the quad. Call once, after the last page.
    __device__ void finish() {
#pragma unroll
        for (int h = 0; h < 2; ++h) sum_[h] = quad_reduce(sum_[h], [](float a, float b) { return a + b; });
    }

    // A row that saw no key: factor 0, log-sum-exp `empty`.
    __device__ float2 normalizer() const { return make_float2(inverse(sum_[0]), inverse(sum_[1])); }
    __device__ float log_sum_exp(int h, float empty) const {
        return sum_[h] == 0.f ? empty : max_[h] * kLn2 + __logf(sum_[h]);
    }

  private:
    __device__ static float inverse(float sum) { return sum == 0.f ? 0.f : ptx::reciprocal_approx(sum); }

    float scale_log2_;
    float max_[2] = {-INFINITY, -INFINITY};  // stored maximum, in units of log2
    float sum_[2] = {0.f, 0.f};              // of this thread's columns until finish()
};

}  // namespace mla::many_rows

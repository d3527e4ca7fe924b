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

// What ends a split: the weights of a thread's two rows.
struct alignas(16) SplitEnd {
    WeightSum rows[2];

    __device__ float2 inverse() const { return make_float2(rows[0].inverse(), rows[1].inverse()); }
};

template <typename T>
class OnlineSoftmax {
  public:
    __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2_(softmax_scale * kLog2E) {}

    // Turns scores into weights relative to the stored maximum; returns by how much to scale what was summed
    // so far.
    __device__ float2 update(float (&scores)[32]) {
        float rescale[2] = {1.f, 1.f}, max[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < 32; ++i) max[i / 2 % 2] = fmaxf(max[i / 2 % 2], scores[i]);
        if (__any_sync(~0u, max[0] * scale_log2_ > max_[0] + kLargest<T> ||
                                max[1] * scale_log2_ > max_[1] + kLargest<T>))
            raise(max, rescale);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
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
        return {{{max_[0], sum_[0]}, {max_[1], sum_[1]}}};
    }

  private:
    // To a page's maxima, of this thread's columns, over the quad, where these outgrow the stored ones.
    __device__ void raise(const float (&max)[2], float (&rescale)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float of_page =
                quad_reduce(max[h], [](float a, float b) { return fmaxf(a, b); }) * scale_log2_;
            if (of_page > max_[h] + kLargest<T>) {
                const float lifted = of_page - kLift<T>;
                rescale[h] = ptx::exp2_approx(max_[h] - lifted);  // 0 at the first page: max_ is -inf
                max_[h] = lifted;
            }
        }
    }

    float scale_log2_;
    float max_[2] = {-INFINITY, -INFINITY};  // stored maximum less the lift, in units of log2
    float sum_[2] = {0.f, 0.f};              // of this thread's columns until finish()
};

}  // namespace mla::many_rows

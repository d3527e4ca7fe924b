// Numbers: pairs of 16-bit values, factors between natural and binary logarithms, sums of a softmax's
// weights.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace mla {

constexpr float kLn2 = 0.69314718055994531f;
constexpr float kLog2E = 1.44269504088896341f;

// The running maximum of an online softmax follows the true one only when that outgrows it by 2^kSlack:
// weights are exact all the same, and most pages leave the output as it is. So does the sum of a sequence's
// chunks.
constexpr float kSlack = 8.f;

// The weight of the maximum, as a power of two. In float16 a weight has all of its bits down to 2^-14 only,
// so the greatest of them, this and the slack above, are just below its infinity: many keys far below one
// that outweighs them keep their share.
template <typename T>
constexpr float kLift = std::is_same_v<T, __half> ? 7.f : 0.f;

// What weights stay below, likewise.
template <typename T>
constexpr float kLargest = kLift<T> + kSlack;

// A row's weights are relative to exp2(max), its maximum less the lift; `sum` is that of all. A row that saw
// no key has -inf and 0.
struct WeightSum {
    float max = -INFINITY;
    float sum = 0.f;

    WeightSum() = default;
    __device__ WeightSum(float max, float sum) : max(max), sum(sum) {}
    __device__ explicit WeightSum(float2 pair) : max(pair.x), sum(pair.y) {}

    __device__ float inverse() const { return ptx::inverse_or_zero(sum); }
    // Of all weights; -inf where no key was seen.
    __device__ float log2() const { return sum == 0.f ? -INFINITY : max + __log2f(sum); }
    // The result's; +inf where no key was seen.
    __device__ float log_sum_exp() const { return sum == 0.f ? INFINITY : log2() * kLn2; }
};

__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

// Eight accumulators of a lane as its share of four 8 x 8 matrices, two neighbouring values of each.
template <typename T>
__device__ inline uint4 pack_matrices(const float* v) {
    return make_uint4(pack(v[0], v[1], T()), pack(v[2], v[3], T()), pack(v[4], v[5], T()),
                      pack(v[6], v[7], T()));
}

}  // namespace mla

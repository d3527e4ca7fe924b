// The PTX that the decode kernels need, but for its products (wgmma.cuh): mbarriers, signals between blocks,
// bulk tensor copies, accesses with an L2 policy, stores of matrices, register hand-over, approximate
// functions.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mla::ptx {

__device__ inline uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier ----

__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT;\n"
        "}\n" ::"r"(smem_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- signals between blocks ----

// Adds to a counter in global memory; what this thread saw written before is visible to whoever waits for it.
__device__ inline void signal_add(uint32_t* counter, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// The counter as it is now, whatever was written before.
__device__ inline uint32_t signal_peek(const uint32_t* counter) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

__device__ inline uint32_t signal_read(const uint32_t* counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// ---- copies ----

// Fetches the map itself, which the first copy would otherwise wait for.
__device__ inline void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One box of a tensor into shared memory, from column 0 on; completion is counted in bytes on `barrier`.
__device__ inline void load_box(void* smem, const CUtensorMap& map, uint64_t* barrier, int c1, int c2, int c3,
                                int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem_address(smem)),
        "l"(&map), "r"(smem_address(barrier)), "r"(0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Likewise; `policy` says how long its lines shall stay in the L2.
__device__ inline void load_box(void* smem, const CUtensorMap& map, uint64_t* barrier, int c1, int c2, int c3,
                                int c4, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address(smem)),
        "l"(&map), "r"(smem_address(barrier)), "r"(0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
        : "memory");
}

// A line to the L1.
__device__ inline void prefetch(const void* at) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(at) : "memory");
}

// A box to the L2 only.
__device__ inline void prefetch_box(const CUtensorMap& map, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(&map), "r"(0),
                 "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

__device__ inline void prefetch_box(const CUtensorMap& map, int c1, int c2, int c3, int c4, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.prefetch.tensor.5d.L2.global.L2::cache_hint [%0, {%1, %2, %3, %4, %5}], %6;" ::"l"(
            &map),
        "r"(0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
        : "memory");
}

// ---- addresses, and how long lines stay in the L2 ----

// `at + step`, but so that the compiler takes two instructions, where for each of many indices it takes
// seven.
template <typename T>
__device__ inline T* further(T* at, int step) {
    at += step;
    asm("" : "+l"(at));
    return at;
}

// How long lines shall stay in the L2: longer than others, or not at all.
__device__ inline uint64_t evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ inline uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// Added in the L2, rounded to nearest, subnormal numbers and results taken for 0 (add_ftz does the same), or
// stored. In one, for the compiler writes either loop over many values by itself.
__device__ inline void add_or_store(float2* to, float2 value, bool adds, uint64_t policy) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, %3, 0;\n"
        "@adds red.relaxed.gpu.global.add.L2::cache_hint.v2.f32 [%0], {%1, %2}, %4;\n"
        "@!adds st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %4;\n"
        "}\n" ::"l"(to),
        "f"(value.x), "f"(value.y), "r"(static_cast<int>(adds)), "l"(policy)
        : "memory");
}
__device__ inline void store(float4* to, float4 value, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(value.x),
                 "f"(value.y), "f"(value.z), "f"(value.w), "l"(policy)
                 : "memory");
}
__device__ inline void store(float2* to, float2 value, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(value.x), "f"(value.y),
                 "l"(policy)
                 : "memory");
}
__device__ inline void store(float* to, float value, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(value), "l"(policy) : "memory");
}
__device__ inline float2 load(const float2* from, uint64_t policy) {
    float2 value;
    asm volatile("ld.relaxed.gpu.global.L2::cache_hint.v2.f32 {%0, %1}, [%2], %3;"
                 : "=f"(value.x), "=f"(value.y)
                 : "l"(from), "l"(policy)
                 : "memory");
    return value;
}
__device__ inline float4 load(const float4* from, uint64_t policy) {
    float4 value;
    asm volatile("ld.relaxed.gpu.global.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(from), "l"(policy)
                 : "memory");
    return value;
}

// Orders this thread's ordinary accesses of shared memory before later ones by wgmma or the copy engine: what
// it wrote is what these read, and what it read is not overwritten yet.
__device__ inline void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- matrices in shared memory ----

// Four 8 x 8 matrices of 16-bit values as products leave them, a pair of columns a lane, to shared memory,
// row by row or column by column: lane 8 j + i holds the place of row or column i of matrix j, 16 bytes.
__device__ inline void store_matrices(void* place, uint4 matrices) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(place)),
        "r"(matrices.x), "r"(matrices.y), "r"(matrices.z), "r"(matrices.w)
        : "memory");
}
__device__ inline void store_matrices_transposed(void* place, uint4 matrices) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(place)),
        "r"(matrices.x), "r"(matrices.y), "r"(matrices.z), "r"(matrices.w)
        : "memory");
}

// ---- registers ----

// The same value in all lanes, which the compiler then keeps in a uniform register, where descriptors go.
__device__ inline int uniform(int value) {
    return __shfl_sync(~0u, value, 0);
}

// Whether this is the one lane of the warp that acts for it, always the same. What is behind the question,
// not behind a kept answer, the compiler takes to be one thread's: no loops around requests to the copy
// engine.
__device__ inline bool elect_lane() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}\n"
        : "=r"(elected));
    return elected != 0;
}

template <int kRegisters>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- approximate functions ----

__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float add_ftz(float x, float y) {
    float sum;
    asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(sum) : "f"(x), "f"(y));
    return sum;
}

__device__ inline float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, and 0 where nothing was summed up.
__device__ inline float inverse_or_zero(float x) {
    return x == 0.f ? 0.f : reciprocal_approx(x);
}

}  // namespace mla::ptx

// What warpgroup matrix products have in common; each kernel has its shapes in products.cuh.
#pragma once

#include "ptx.cuh"
#include "tiles.cuh"

namespace mla::wgmma {

__device__ inline void fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ inline void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of accumulators across fence() and wait().
template <int kCount>
__device__ inline void pin(float* accumulators) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}
template <int kCount>
__device__ inline void pin(float (&accumulators)[kCount]) {
    pin<kCount>(&accumulators[0]);
}

// Low word of a shared-memory matrix descriptor: where a 128-byte swizzled tile of 64 16-bit columns begins,
// in units of 16 bytes. leading_bytes: from one 64-column tile to the next, where a product spans several
// along columns (V with many rows); else unused. The high word is the same for all: swizzle, and 1,024 bytes
// from one atom of 8 rows to the next.
__device__ inline uint32_t descriptor(const void* smem, uint32_t leading_bytes) {
    return (leading_bytes >> 4) << 16 | (ptx::smem_address(smem) & 0x3FFFF) >> 4;
}

__device__ inline uint32_t advance(uint32_t descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

}  // namespace mla::wgmma

// Warpgroup matrix products with the query rows along the narrow side: m64nNk16 for N of 16 and 32, both
// factors in shared memory; float32 accumulators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../wgmma.cuh"

namespace mla::few_rows {

template <typename T, int kRows>
struct Product;

// clang-format off
#define MLA_REGISTERS_0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MLA_REGISTERS_8_15 "%8, %9, %10, %11, %12, %13, %14, %15"
#define MLA_ACC8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// d = a b, added to d if `accumulate`. A, B, C: the places of a, b and `accumulate` among the operands.
#define MLA_PRODUCT(N, PTX_TYPE, REGISTERS, TRANSPOSE_A, A, B, C, ...)                              \
    asm volatile(                                                                                   \
        "{\n"                                                                                       \
        ".reg .pred accumulate;\n"                                                                  \
        ".reg .b64 a, b;\n"                                                                         \
        "mov.b64 a, {%" A ", 0x40000040};\n"                                                        \
        "mov.b64 b, {%" B ", 0x40000040};\n"                                                        \
        "setp.ne.b32 accumulate, %" C ", 0;\n"                                                      \
        "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." PTX_TYPE "." PTX_TYPE                      \
        " {" REGISTERS "}, a, b, accumulate, 1, 1, " TRANSPOSE_A ", 0;\n"                           \
        "}\n"                                                                                       \
        : __VA_ARGS__                                                                               \
        : "r"(a), "r"(b), "r"(static_cast<int>(accumulate)))

#define MLA_DEFINE_PRODUCT(T, PTX_TYPE, ROWS, N, REGISTERS, A, B, C, ...)                           \
  template <>                                                                                       \
  struct Product<T, ROWS> {                                                                         \
    /* d (64 keys, rows) = a (64, 16) b^T (rows, 16) */                                             \
    __device__ static void scores(float (&d)[ROWS / 2], uint32_t a, uint32_t b, bool accumulate) {  \
      MLA_PRODUCT(N, PTX_TYPE, REGISTERS, "0", A, B, C, __VA_ARGS__);                               \
    }                                                                                               \
    /* d (64 columns, rows) += a^T (16 keys, 64 columns) b^T (rows, 16 keys) */                     \
    __device__ static void output(float (&d)[ROWS / 2], uint32_t a, uint32_t b) {                   \
      constexpr bool accumulate = true;                                                             \
      MLA_PRODUCT(N, PTX_TYPE, REGISTERS, "1", A, B, C, __VA_ARGS__);                               \
    }                                                                                               \
  };

#define MLA_DEFINE_PRODUCTS(T, PTX_TYPE)                                                            \
  MLA_DEFINE_PRODUCT(T, PTX_TYPE, 16, "16", MLA_REGISTERS_0_7, "8", "9", "10", MLA_ACC8(0))         \
  MLA_DEFINE_PRODUCT(T, PTX_TYPE, 32, "32", MLA_REGISTERS_0_7 ", " MLA_REGISTERS_8_15,              \
                     "16", "17", "18", MLA_ACC8(0), MLA_ACC8(8))

MLA_DEFINE_PRODUCTS(__nv_bfloat16, "bf16")
MLA_DEFINE_PRODUCTS(__half, "f16")

#undef MLA_DEFINE_PRODUCTS
#undef MLA_DEFINE_PRODUCT
#undef MLA_PRODUCT
#undef MLA_ACC8
#undef MLA_REGISTERS_8_15
#undef MLA_REGISTERS_0_7
// clang-format on

}  // namespace mla::few_rows

// Warpgroup matrix products: m64n64k16 for scores, m64n128k16 for the output; float32 accumulators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../wgmma.cuh"

namespace mla::many_rows {

template <typename T>
struct Product;

// clang-format off
#define MLA_REGISTERS_0_31 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MLA_REGISTERS_32_63 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MLA_ACC8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MLA_ACC32(i) MLA_ACC8(i), MLA_ACC8(i + 8), MLA_ACC8(i + 16), MLA_ACC8(i + 24)

#define MLA_DEFINE_PRODUCT(T, PTX_TYPE)                                                                     \
  template <>                                                                                               \
  struct Product<T> {                                                                                       \
    /* d (64, 64) = a (64, 16) b^T (64, 16), both in shared memory; added to d if `accumulate` */           \
    __device__ static void scores(float (&d)[32], uint32_t a, uint32_t b, bool accumulate) {                \
      asm volatile(                                                                                         \
          "{\n"                                                                                             \
          ".reg .pred accumulate;\n"                                                                        \
          ".reg .b64 a, b;\n"                                                                               \
          "mov.b64 a, {%32, 0x40000040};\n"                                                                 \
          "mov.b64 b, {%33, 0x40000040};\n"                                                                 \
          "setp.ne.b32 accumulate, %34, 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." PTX_TYPE "." PTX_TYPE                               \
          " {" MLA_REGISTERS_0_31 "}, a, b, accumulate, 1, 1, 0, 0;\n"                                      \
          "}\n"                                                                                             \
          : MLA_ACC32(0)                                                                                    \
          : "r"(a), "r"(b), "r"(static_cast<int>(accumulate)));                                             \
    }                                                                                                       \
    /* d (64, 128) = a (64, 16) b (16, 128), a in registers, b a row per token; added to d if `accumulate` */\
    __device__ static void output(float* d, const uint32_t* a, uint32_t b, bool accumulate) {               \
      asm volatile(                                                                                         \
          "{\n"                                                                                             \
          ".reg .pred accumulate;\n"                                                                        \
          ".reg .b64 b;\n"                                                                                  \
          "mov.b64 b, {%68, 0x40000040};\n"                                                                 \
          "setp.ne.b32 accumulate, %69, 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." PTX_TYPE "." PTX_TYPE                              \
          " {" MLA_REGISTERS_0_31 ", " MLA_REGISTERS_32_63                                                  \
          "}, {%64, %65, %66, %67}, b, accumulate, 1, 1, 1;\n"                                              \
          "}\n"                                                                                             \
          : MLA_ACC32(0), MLA_ACC32(32)                                                                     \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(static_cast<int>(accumulate)));         \
    }                                                                                                       \
  };

MLA_DEFINE_PRODUCT(__nv_bfloat16, "bf16")
MLA_DEFINE_PRODUCT(__half, "f16")

#undef MLA_DEFINE_PRODUCT
#undef MLA_ACC32
#undef MLA_ACC8
#undef MLA_REGISTERS_32_63
#undef MLA_REGISTERS_0_31
// clang-format on

}  // namespace mla::many_rows

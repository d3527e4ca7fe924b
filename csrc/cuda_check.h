// CUDA errors on the host become Python RuntimeErrors that name the call, file and line.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/error.h>

#define CUDA_CHECK(call)                                                                                 \
    do {                                                                                                 \
        const cudaError_t status = (call);                                                               \
        if (status != cudaSuccess) {                                                                     \
            TVM_FFI_THROW(RuntimeError) << #call << " failed at " << __FILE__ << ":" << __LINE__ << ": " \
                                        << cudaGetErrorString(status);                                   \
        }                                                                                                \
    } while (0)

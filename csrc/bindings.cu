// The library's exported functions: check what the kernels rely on, fill their parameters, launch.
// Shapes and dtypes in words a user understands are interface.py's business; these checks keep a wrong call
// from becoming a wrong address.
#include <cudaTypedefs.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include "cuda_check.h"
#include "params.h"

namespace mla {
namespace {

using tvm::ffi::TensorView;

constexpr int kAlignment = 16;  // bytes, of every 16-byte load and of the copy engine

#define MLA_CHECK(condition, message) \
    if (!(condition)) TVM_FFI_THROW(ValueError) << message

template <typename T>
T* data(const TensorView& tensor) {
    return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

std::string describe(const TensorView& tensor) {
    std::ostringstream text;
    text << "shape (";
    for (int i = 0; i < tensor.ndim(); ++i) text << (i ? ", " : "") << tensor.size(i);
    text << "), dtype code " << int(tensor.dtype().code) << " of " << int(tensor.dtype().bits) << " bits";
    return text.str();
}

bool has_dtype(const TensorView& tensor, uint8_t code, uint8_t bits) {
    return tensor.dtype().code == code && tensor.dtype().bits == bits && tensor.dtype().lanes == 1;
}

// A CUDA tensor of this shape and dtype whose last dimension is contiguous; -1 stands for any size.
void check(const char* name, const TensorView& tensor, std::initializer_list<int64_t> shape, uint8_t code,
           uint8_t bits) {
    bool ok = tensor.device().device_type == kDLCUDA && tensor.ndim() == static_cast<int>(shape.size()) &&
              has_dtype(tensor, code, bits);
    int dim = 0;
    for (const int64_t size : shape) {
        ok = ok && (size == -1 || tensor.size(dim) == size);
        ++dim;
    }
    ok = ok && (tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1);
    MLA_CHECK(ok, name << ": unexpected " << describe(tensor));
}

// Strides and base of 16-bit values that are moved 16 bytes at a time.
void check_alignment(const char* name, const TensorView& tensor) {
    bool ok = reinterpret_cast<uintptr_t>(data<void>(tensor)) % kAlignment == 0;
    for (int dim = 0; dim < tensor.ndim() - 1; ++dim)
        ok = ok && (tensor.size(dim) <= 1 || tensor.stride(dim) * 2 % kAlignment == 0);
    MLA_CHECK(ok, name << ": its address and strides must be multiples of 16 bytes");
}

// Rows of the plan are read whole.
void check_plan(const TensorView& tile_scheduler_metadata) {
    MLA_CHECK(tile_scheduler_metadata.IsContiguous() &&
                  reinterpret_cast<uintptr_t>(data<void>(tile_scheduler_metadata)) % alignof(PartPlan) == 0,
              "tile_scheduler_metadata: it must be contiguous and its address a multiple of 32 bytes");
}

void copy_strides(int64_t (&out)[3], const TensorView& tensor) {
    for (int dim = 0; dim < 3; ++dim) out[dim] = tensor.stride(dim);
}

cudaStream_t current_stream(const TensorView& tensor) {
    return static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, tensor.device().device_id));
}

// The copy engine's view of the cache: boxes of 64 columns x 64 tokens of one KV head of one page.
CUtensorMap make_k_map(const TensorView& k_cache) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
        MLA_CHECK(found == cudaDriverEntryPointSuccess,
                  "the driver has no cuTensorMapEncodeTiled: CUDA 12 is needed");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    const auto stride_bytes = [&](int dim) -> cuuint64_t {
        return k_cache.size(dim) > 1 ? k_cache.stride(dim) * 2
                                     : kAlignment;  // of a single entry: any legal value
    };
    const cuuint64_t sizes[] = {kHeadDim, kPageSize, static_cast<cuuint64_t>(k_cache.size(2)),
                                static_cast<cuuint64_t>(k_cache.size(0))};
    const cuuint64_t strides[] = {stride_bytes(1), stride_bytes(2), stride_bytes(0)};
    const cuuint32_t box[] = {64, kPageSize, 1, 1};
    const cuuint32_t element_strides[] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult status = encode(&map,
                                   has_dtype(k_cache, kDLBfloat, 16) ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                   4, data<void>(k_cache), sizes, strides, box, element_strides,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    MLA_CHECK(status == CUDA_SUCCESS, "k_cache: the copy engine refuses its address or strides (CUDA error "
                                          << int(status) << "), " << describe(k_cache));
    return map;
}

void plan(TensorView seq_lens, TensorView tile_scheduler_metadata, TensorView num_splits) {
    const int64_t batch = seq_lens.numel();
    check("cache_seqlens", seq_lens, {batch}, kDLInt, 32);
    check("tile_scheduler_metadata", tile_scheduler_metadata, {-1, kMetadataWidth}, kDLInt, 32);
    check("num_splits", num_splits, {batch + 1}, kDLInt, 32);
    check_plan(tile_scheduler_metadata);
    MLA_CHECK(seq_lens.IsContiguous() && num_splits.IsContiguous(),
              "cache_seqlens and num_splits must be contiguous");
    const PlanParams params{.seq_lens = data<int>(seq_lens),
                            .parts = data<PartPlan>(tile_scheduler_metadata),
                            .num_splits = data<int>(num_splits),
                            .batch = static_cast<int>(batch),
                            .num_parts = static_cast<int>(tile_scheduler_metadata.size(0))};
    launch_plan(params, current_stream(seq_lens));
}

void decode(TensorView q_nope, TensorView q_pe, TensorView k_cache, TensorView block_table,
            TensorView seq_lens, TensorView tile_scheduler_metadata, TensorView num_splits, TensorView out,
            TensorView lse, TensorView out_partial, TensorView lse_partial, double softmax_scale,
            bool causal) {
    check("q_nope", q_nope, {-1, -1, -1, kHeadDimV}, q_nope.dtype().code, 16);
    const uint8_t code = q_nope.dtype().code;
    const int64_t batch = q_nope.size(0), query_len = q_nope.size(1), heads = q_nope.size(2);
    MLA_CHECK(code == kDLBfloat || code == kDLFloat, "q_nope: unexpected " << describe(q_nope));
    check("q_pe", q_pe, {batch, query_len, heads, kHeadDim - kHeadDimV}, code, 16);
    check("k_cache", k_cache, {-1, kPageSize, -1, kHeadDim}, code, 16);
    check("block_table", block_table, {batch, -1}, kDLInt, 32);
    check("cache_seqlens", seq_lens, {batch}, kDLInt, 32);
    check("tile_scheduler_metadata", tile_scheduler_metadata, {-1, kMetadataWidth}, kDLInt, 32);
    check("num_splits", num_splits, {batch + 1}, kDLInt, 32);
    check("out", out, {batch, query_len, heads, kHeadDimV}, code, 16);
    check("lse", lse, {batch, heads, query_len}, kDLFloat, 32);
    const int64_t parts = tile_scheduler_metadata.size(0);
    check("out_partial", out_partial, {batch + parts, query_len * heads, kHeadDimV}, kDLFloat, 32);
    check("lse_partial", lse_partial, {batch + parts, query_len * heads}, kDLFloat, 32);
    check_alignment("q_nope", q_nope);
    check_alignment("q_pe", q_pe);
    check_alignment("k_cache", k_cache);
    check_alignment("out", out);
    MLA_CHECK(k_cache.size(2) > 0 && heads % k_cache.size(2) == 0,
              "q has " << heads << " heads, not a multiple of k_cache's " << k_cache.size(2));
    check_plan(tile_scheduler_metadata);
    MLA_CHECK(seq_lens.IsContiguous() && num_splits.IsContiguous() && out_partial.IsContiguous() &&
                  lse_partial.IsContiguous(),
              "cache_seqlens, num_splits, out_partial and lse_partial must be contiguous");

    DecodeParams params{.q_nope = data<void>(q_nope),
                        .q_pe = data<void>(q_pe),
                        .out = data<void>(out),
                        .lse = data<float>(lse),
                        .out_partial = data<float>(out_partial),
                        .lse_partial = data<float>(lse_partial),
                        .block_table = data<int>(block_table),
                        .seq_lens = data<int>(seq_lens),
                        .parts = data<PartPlan>(tile_scheduler_metadata),
                        .num_splits = data<int>(num_splits),
                        .q_nope_stride = {},
                        .q_pe_stride = {},
                        .out_stride = {},
                        .lse_stride = {lse.stride(0), lse.stride(1), lse.stride(2)},
                        .block_table_stride = block_table.stride(0),
                        .max_pages = static_cast<int>(block_table.size(1)),
                        .batch = static_cast<int>(batch),
                        .query_len = static_cast<int>(query_len),
                        .num_heads = static_cast<int>(heads),
                        .num_kv_heads = static_cast<int>(k_cache.size(2)),
                        .num_parts = static_cast<int>(parts),
                        .causal = causal,
                        .softmax_scale = static_cast<float>(softmax_scale),
                        .dtype = code == kDLBfloat ? DType::kBFloat16 : DType::kHalf};
    copy_strides(params.q_nope_stride, q_nope);
    copy_strides(params.q_pe_stride, q_pe);
    copy_strides(params.out_stride, out);

    const cudaStream_t stream = current_stream(q_nope);
    launch_decode(params, make_k_map(k_cache), stream);
    launch_combine(params, stream);
}

}  // namespace
}  // namespace mla

#pragma GCC diagnostic ignored "-Wunused-parameter"  // of the wrappers that these macros write
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, mla::plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, mla::decode);

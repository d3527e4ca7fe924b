// The library's exported functions: check what the kernels rely on, fill their parameters, launch.
// Shapes and dtypes in words a user understands are interface.py's business; these checks keep a wrong call
// from becoming a wrong address.
#include <cudaTypedefs.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <algorithm>
#include <array>
#include <climits>

#include "cuda_check.h"
#include "params.h"

namespace mla {
namespace {

using tvm::ffi::Optional;
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
    MLA_CHECK(
        tile_scheduler_metadata.size(0) > 0 && tile_scheduler_metadata.IsContiguous() &&
            reinterpret_cast<uintptr_t>(data<void>(tile_scheduler_metadata)) % alignof(PartPlan) == 0,
        "tile_scheduler_metadata: it must have rows, be contiguous, and its address a multiple of 32 bytes");
}

void check_chunk_level(int64_t chunk_level) {
    MLA_CHECK(0 <= chunk_level && chunk_level <= 2,
              "chunk_level: got " << chunk_level << ", expected 0 to 2");
}

cudaStream_t current_stream(const TensorView& tensor) {
    return static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, tensor.device().device_id));
}

// The copy engine's view of a tensor of 4 dimensions: of its columns as tiles of 64, in the order 64 columns,
// dims[0], dims[1], tiles, dims[2]. A box has 64 columns, and as many entries as `box` says of the next
// three.
CUtensorMap make_map(const char* name, const TensorView& tensor, std::array<int, 3> dims,
                     std::array<int, 3> box) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
#else  // CUDA 12.4 has only this one, and 13 has it no more
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
        MLA_CHECK(found == cudaDriverEntryPointSuccess,
                  "the driver has no cuTensorMapEncodeTiled: CUDA 12 is needed");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    constexpr cuuint64_t kColumns = kTileColumns;
    const auto size = [&](int i) { return static_cast<cuuint64_t>(tensor.size(dims[i])); };
    const auto stride = [&](int i) {  // of a single entry: any legal one
        return size(i) > 1 ? static_cast<cuuint64_t>(tensor.stride(dims[i]) * 2) : kAlignment;
    };
    const cuuint64_t sizes[] = {kColumns, size(0), size(1), tensor.size(3) / kColumns, size(2)};
    const cuuint64_t strides[] = {stride(0), stride(1), kColumns * 2, stride(2)};
    const cuuint32_t box_sizes[] = {kColumns, static_cast<cuuint32_t>(box[0]),
                                    static_cast<cuuint32_t>(box[1]), static_cast<cuuint32_t>(box[2]), 1};
    const cuuint32_t element_strides[] = {1, 1, 1, 1, 1};
    CUtensorMap map;
    const CUresult status = encode(
        &map,
        has_dtype(tensor, kDLBfloat, 16) ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        5, data<void>(tensor), sizes, strides, box_sizes, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    MLA_CHECK(status == CUDA_SUCCESS, name << ": the copy engine refuses its address or strides (CUDA error "
                                           << int(status) << "), " << describe(tensor));
    return map;
}

void plan(TensorView seq_lens, TensorView tile_scheduler_metadata, TensorView num_splits, int64_t chunk_level,
          int64_t rows) {
    const int64_t batch = seq_lens.numel();
    check("cache_seqlens", seq_lens, {batch}, kDLInt, 32);
    check("tile_scheduler_metadata", tile_scheduler_metadata, {-1, kMetadataWidth}, kDLInt, 32);
    check("num_splits", num_splits, {batch + 1}, kDLInt, 32);
    check_plan(tile_scheduler_metadata);
    check_chunk_level(chunk_level);
    MLA_CHECK(batch > 0, "cache_seqlens: got no sequences, expected at least one");
    MLA_CHECK(rows > 0, "rows_per_kv_head: got " << rows << ", expected 1 or more");
    MLA_CHECK(seq_lens.IsContiguous() && num_splits.IsContiguous(),
              "cache_seqlens and num_splits must be contiguous");
    const PlanParams params{.seq_lens = data<int>(seq_lens),
                            .parts = data<PartPlan>(tile_scheduler_metadata),
                            .num_splits = data<int>(num_splits),
                            .batch = static_cast<int>(batch),
                            .num_parts = static_cast<int>(tile_scheduler_metadata.size(0)),
                            .chunk_level = static_cast<int>(chunk_level),
                            .few_rows = rows <= kFewRows,
                            .full_tiles = ceil_div(rows, ceil_div(rows, kTileRows)) > kFullTile,
                            .one_tile = rows <= kTileRows};
    if (chunk_level > 0) {
        launch_plan_chunks(params, current_stream(seq_lens));
    } else {
        launch_plan(params, current_stream(seq_lens));
    }
}

// Query rows for which the kernel that decodes has room: 16 and 32 few_rows, 64 many_rows. By shapes alone: a
// captured graph is replayed with other lengths.
int kernel_rows_for(int64_t rows) {
    if (rows > kFewRows) return kTileRows;
    return rows > kFewRows / 2 ? kFewRows : kFewRows / 2;
}

DecodeMaps make_maps(TensorView q_nope, TensorView q_pe, TensorView k_cache, const DecodeParams& params) {
    const std::array<int, 3> q_dims{2, 1, 0}, k_dims{1, 2, 0};
    const auto query_maps = [&](int heads) -> QueryMaps {
        const int tokens = params.tokens_per_tile;
        return {.nope = make_map("q_nope", q_nope, q_dims, {heads, tokens, params.query_box_tiles}),
                .pe = make_map("q_pe", q_pe, q_dims, {heads, tokens, 1})};
    };
    return {.query = {query_maps(params.heads_per_tile),
                      params.short_tile < 0 ? QueryMaps{} : query_maps(params.heads_of_short_tile)},
            .k_latent =
                make_map("k_cache", k_cache, k_dims, {kPageSize, 1, latent_box_tiles(params.kernel_rows)}),
            .k_rope = make_map("k_cache", k_cache, k_dims, {kPageSize, 1, 1})};
}

void check_decode(TensorView q_nope, TensorView q_pe, TensorView k_cache, TensorView block_table,
                  TensorView seq_lens, Optional<TensorView> cu_seqlens_q, int64_t max_query_len,
                  TensorView tile_scheduler_metadata, TensorView out, TensorView lse) {
    check("q_nope", q_nope, {-1, -1, -1, kHeadDimV}, q_nope.dtype().code, 16);
    const uint8_t code = q_nope.dtype().code;
    const int64_t entries = q_nope.size(0), tokens = q_nope.size(1), heads = q_nope.size(2);
    const int64_t batch = seq_lens.numel();
    MLA_CHECK(code == kDLBfloat || code == kDLFloat, "q_nope: unexpected " << describe(q_nope));
    MLA_CHECK(entries == (cu_seqlens_q ? 1 : batch), "q_nope: unexpected " << describe(q_nope));
    check("q_pe", q_pe, {entries, tokens, heads, kHeadDim - kHeadDimV}, code, 16);
    check("k_cache", k_cache, {-1, kPageSize, -1, kHeadDim}, code, 16);
    check("block_table", block_table, {batch, -1}, kDLInt, 32);
    check("cache_seqlens", seq_lens, {batch}, kDLInt, 32);
    check("tile_scheduler_metadata", tile_scheduler_metadata, {-1, kMetadataWidth}, kDLInt, 32);
    check("out", out, {entries, tokens, heads, kHeadDimV}, code, 16);
    check("lse", lse, {entries, heads, tokens}, kDLFloat, 32);
    check_alignment("q_nope", q_nope);
    check_alignment("q_pe", q_pe);
    check_alignment("k_cache", k_cache);
    check_alignment("out", out);
    MLA_CHECK(heads > 0 && k_cache.size(2) > 0 && heads % k_cache.size(2) == 0,
              "q has " << heads << " heads, not a multiple of k_cache's " << k_cache.size(2));
    check_plan(tile_scheduler_metadata);
    MLA_CHECK(seq_lens.IsContiguous(), "cache_seqlens must be contiguous");
    MLA_CHECK(max_query_len > 0, "max_query_len: got " << max_query_len);
    if (cu_seqlens_q) {
        check("cu_seqlens_q", *cu_seqlens_q, {batch + 1}, kDLInt, 32);
    } else {
        MLA_CHECK(max_query_len == tokens, "max_query_len: got " << max_query_len << ", expected " << tokens);
    }
}

// Scratch for `slots` partials of `rows` rows.
void check_partials(TensorView out_partial, TensorView weight_sums, int64_t slots, int64_t rows) {
    check("out_partial", out_partial, {-1, -1, kHeadDimV}, kDLFloat, 32);
    check("weight_sums", weight_sums, {out_partial.size(0), out_partial.size(1), 2}, kDLFloat, 32);
    MLA_CHECK(out_partial.IsContiguous() && weight_sums.IsContiguous(),
              "out_partial and weight_sums must be contiguous");
    MLA_CHECK(slots == 0 || (out_partial.size(0) >= slots && out_partial.size(1) >= rows),
              "out_partial: unexpected " << describe(out_partial) << ", expected " << slots << " x " << rows);
    MLA_CHECK(out_partial.size(0) * out_partial.size(1) <= INT_MAX,
              "out_partial: more than 2^31 rows, " << describe(out_partial));
}

void decode(TensorView q_nope, TensorView q_pe, TensorView k_cache, TensorView block_table,
            TensorView seq_lens, Optional<TensorView> cu_seqlens_q, int64_t max_query_len,
            TensorView tile_scheduler_metadata, TensorView out, TensorView lse, TensorView out_partial,
            TensorView weight_sums, double softmax_scale, bool causal, int64_t chunk_level) {
    check_decode(q_nope, q_pe, k_cache, block_table, seq_lens, cu_seqlens_q, max_query_len,
                 tile_scheduler_metadata, out, lse);
    check_chunk_level(chunk_level);
    const int64_t heads = q_nope.size(2), num_kv_heads = k_cache.size(2), batch = seq_lens.numel();
    const int64_t parts = tile_scheduler_metadata.size(0);
    const int max_pages = static_cast<int>(block_table.size(1)), level = static_cast<int>(chunk_level);
    const RowTiling tiling(heads, num_kv_heads, max_query_len);
    const int kernel_rows = kernel_rows_for(max_query_len * tiling.heads_per_group);
    const int chunks_per_seq = level > 0 ? most_chunks(max_pages, level) : 0;
    if (level > 0) {
        const int64_t slots = parts + std::min(batch, parts - 1) * chunks_per_seq;
        check_partials(out_partial, weight_sums, slots * tiling.num_row_tiles,
                       (tiling.rows_per_tile() + 7) / 8 * 8);
    } else {  // one part's splits are whole sequences, and others need at least a slot a part
        check_partials(out_partial, weight_sums, parts > 1 ? parts : 0, heads * max_query_len);
    }

    const DecodeParams params{
        .out = data<void>(out),
        .lse = data<float>(lse),
        .out_partial = data<float>(out_partial),
        .weight_sums = data<float2>(weight_sums),
        .block_table = data<int>(block_table),
        .seq_lens = data<int>(seq_lens),
        .cu_seqlens_q = cu_seqlens_q ? data<int>(*cu_seqlens_q) : nullptr,
        .parts = data<PartPlan>(tile_scheduler_metadata),
        .out_stride = {out.stride(0), out.stride(1), out.stride(2)},
        .lse_stride = {lse.stride(0), lse.stride(1), lse.stride(2)},
        .block_table_stride = block_table.stride(0),
        .max_pages = max_pages,
        .batch = static_cast<int>(batch),
        .query_len = static_cast<int>(max_query_len),
        .num_tokens = static_cast<int>(q_nope.size(1)),
        .chunk_level = level,
        .chunks_per_seq = chunks_per_seq,
        .num_heads = static_cast<int>(heads),
        .num_kv_heads = static_cast<int>(num_kv_heads),
        .num_parts = static_cast<int>(parts),
        .num_slots = static_cast<int>(out_partial.size(0)),
        .partial_rows = static_cast<int>(out_partial.size(1)),
        .heads_per_group = tiling.heads_per_group,
        .heads_per_tile = tiling.heads_per_tile,
        .tokens_per_tile = tiling.tokens_per_tile,
        .tiles_per_token = tiling.tiles_per_token,
        .short_tile = tiling.is_even() ? -1 : tiling.tiles_per_token - 1,
        .heads_of_short_tile = tiling.heads_of_last_tile(),
        .kernel_rows = kernel_rows,
        .query_box_tiles = tiling.is_even() && tiling.rows_per_tile() == kernel_rows ? kTilesHalfV : 1,
        .inverse_heads = static_cast<int>(ceil_div(1 << 16, tiling.heads_per_tile)),
        .inverse_heads_of_short_tile = static_cast<int>(ceil_div(1 << 16, tiling.heads_of_last_tile())),
        .inverse_tiles_per_token = static_cast<uint32_t>(ceil_div(1ll << 31, tiling.tiles_per_token)),
        .inverse_kv_heads = static_cast<uint32_t>(ceil_div(1ll << 31, num_kv_heads)),
        .num_row_tiles = static_cast<int>(tiling.num_row_tiles),
        .first_row_tile = 0,
        .arrivals_slot = 0,
        .causal = causal,
        .softmax_scale = static_cast<float>(softmax_scale),
        .dtype = q_nope.dtype().code == kDLBfloat ? DType::kBFloat16 : DType::kHalf};
    launch_decode(params, make_maps(q_nope, q_pe, k_cache, params), current_stream(q_nope));
}

}  // namespace
}  // namespace mla

#pragma GCC diagnostic ignored "-Wunused-parameter"  // of the wrappers that these macros write
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, mla::plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, mla::decode);

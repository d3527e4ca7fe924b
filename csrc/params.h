// Plain structs that cross from the host checks to the kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mla {

constexpr int kPageSize = 64;      // tokens in a page of the KV cache
constexpr int kTileRows = 64;      // query rows a thread block works on: wgmma's M
constexpr int kHeadDim = 576;      // of q and k: 512 latent + 64 rope
constexpr int kHeadDimV = 512;     // of v and out: the latent part of k
constexpr int kMetadataWidth = 8;  // int32 words in a row of tile_scheduler_metadata

enum class DType { kBFloat16, kHalf };

// A row of tile_scheduler_metadata; schedule.py's Field names the same columns.
struct alignas(32) PartPlan {
    int first_seq;      // the batch size marks an idle part
    int first_page;     // page of first_seq to start at
    int last_seq;       // inclusive
    int last_page_end;  // page of last_seq to stop before
    int first_split;    // number of the first split within first_seq
    // Row i also names the i-th sequence that has several splits, for the merge; merge_seq is -1 past the
    // last.
    int merge_seq;
    int merge_first_slot;  // its first partial; the others follow
    int merge_splits;
};
static_assert(sizeof(PartPlan) == kMetadataWidth * sizeof(int));

struct PlanParams {
    const int* seq_lens;  // (b)
    PartPlan* parts;      // (num_parts)
    int* num_splits;      // (b + 1)
    int batch;
    int num_parts;
};

// Strides in elements. Rows of a KV head: row r is query token r / group, head r % group of the group.
struct DecodeParams {
    const void* q_nope;      // (b, s_q, h_q, 512)
    const void* q_pe;        // (b, s_q, h_q, 64)
    void* out;               // (b, s_q, h_q, 512)
    float* lse;              // (b, h_q, s_q)
    float* out_partial;      // (b + num_parts, s_q * h_q, 512)
    float* lse_partial;      // (b + num_parts, s_q * h_q)
    const int* block_table;  // (b, max_pages)
    const int* seq_lens;     // (b)
    const PartPlan* parts;   // (num_parts)
    const int* num_splits;   // (b + 1)

    int64_t q_nope_stride[3];  // b, s_q, h_q
    int64_t q_pe_stride[3];
    int64_t out_stride[3];
    int64_t lse_stride[3];  // b, h_q, s_q
    int64_t block_table_stride;
    int max_pages;  // entries in a row of the block table

    int batch;
    int query_len;     // s_q
    int num_heads;     // h_q
    int num_kv_heads;  // h_kv
    int num_parts;
    bool causal;
    float softmax_scale;
    DType dtype;
};

// Pages of a sequence; a negative length counts as none.
__host__ __device__ inline int pages_of(int seq_len) {
    return seq_len <= 0 ? 0 : (seq_len - 1) / kPageSize + 1;
}

void launch_plan(const PlanParams& params, cudaStream_t stream);
void launch_decode(const DecodeParams& params, const CUtensorMap& k_map, cudaStream_t stream);
void launch_combine(const DecodeParams& params, cudaStream_t stream);

}  // namespace mla

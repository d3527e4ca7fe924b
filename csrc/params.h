// Plain structs that cross from the host checks to the kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "row_tiling.h"

namespace mla {

constexpr int kPageSize = 64;     // tokens in a page of the KV cache
constexpr int kHeadDim = 576;     // of q and k: 512 latent + 64 rope
constexpr int kHeadDimV = 512;    // of v and out: the latent part of k
constexpr int kTileColumns = 64;  // of q and of the cache, that are multiplied, and fetched, as one
constexpr int kTilesHalfV = kHeadDimV / kTileColumns / 2;  // in half of V
constexpr int kTilesQuarterV = kTilesHalfV / 2;
constexpr int kMetadataWidth = 8;  // int32 words in a row of tile_scheduler_metadata

constexpr unsigned kStartCost = 3;       // of a split, in pages: START_COST of layout.py
constexpr unsigned kPartialCost = 3;     // of a split that is not its sequence's only one: PARTIAL_COST there
constexpr int kFewRows = 32;             // query rows that share a KV head: FEW_ROWS there
constexpr unsigned kFewPages = 4;        // FEW_PAGES there
constexpr unsigned kWholePages = 16;     // WHOLE_PAGES there
constexpr unsigned kTwoPageSplits = 13;  // TWO_PAGE_SPLITS there
constexpr unsigned kBusyPercent = 40;    // BUSY_PERCENT there
constexpr int kFullTile = 48;            // FULL_TILE there
constexpr unsigned kCutCost = 8;         // CUT_COST there
constexpr int kFewSequences = 32;        // FEW_SEQUENCES there
constexpr unsigned kSplitsASpare = 5;    // SPLITS_A_SPARE there
constexpr unsigned kLongSplits = 8;      // LONG_SPLITS there
constexpr unsigned kLongSplitsOfTiles = 5;  // LONG_SPLITS_OF_TILES there

enum class DType { kBFloat16, kHalf };

// A row of tile_scheduler_metadata; schedule.py's Field names the same columns.
struct alignas(32) PartPlan {
    int first_seq;      // the batch size marks an idle part
    int first_page;     // page of first_seq to start at
    int last_seq;       // inclusive
    int last_page_end;  // page of last_seq to stop before
    int first_split;    // number of the first split within first_seq
    int first_splits;   // how many splits first_seq has, -2 where the first hands a sum over to the second
    int last_splits;    // how many splits last_seq has, likewise
    int first_slot;     // of the first split's partial
};
static_assert(sizeof(PartPlan) == kMetadataWidth * sizeof(int));

struct PlanParams {
    const int* seq_lens;  // (b)
    PartPlan* parts;      // (num_parts)
    int* num_splits;      // (b + 1)
    int batch;
    int num_parts;
    int chunk_level;  // 0: cut anywhere
    bool few_rows;    // is_few() of layout.py
    bool full_tiles;  // is_full() there
    bool one_tile;    // is_one_tile() there
};

// Strides in elements. The query itself comes as two tensor maps, of its latent and its rope part.
struct DecodeParams {
    void* out;                // (b, s_q, h_q, 512), or ragged (tokens, h_q, 512)
    float* lse;               // (b, h_q, s_q), or ragged (h_q, tokens)
    float* out_partial;       // (num_slots, partial_rows, 512), laid out as partial.cuh says; batch-invariant
                              // with num_row_tiles times as many, shorter ones
    float2* weight_sums;      // (num_slots, partial_rows) of each partial row: numbers.cuh's WeightSum
    const int* block_table;   // (b, max_pages)
    const int* seq_lens;      // (b)
    const int* cu_seqlens_q;  // (b + 1) first query token of each sequence; null where all have s_q
    const PartPlan* parts;    // (num_parts)

    int64_t out_stride[3];  // b, s_q, h_q
    int64_t lse_stride[3];  // b, h_q, s_q
    int64_t block_table_stride;
    int max_pages;  // entries in a row of the block table

    int batch;
    int query_len;    // s_q, of a ragged batch the largest
    int num_tokens;   // of a ragged batch
    int chunk_level;  // above 0: batch-invariant, and a sequence that is cut has slots for
    int chunks_per_seq;
    int num_heads;     // h_q
    int num_kv_heads;  // h_kv
    int num_parts;
    int num_slots;
    int partial_rows;                  // of a slot; batch-invariant of each row tile of one, in whole octets
    int heads_per_group;               // h_q / h_kv
    int heads_per_tile;                // a tile's rows: this many heads of
    int tokens_per_tile;               // this many query tokens
    int tiles_per_token;               // that the heads of these tokens take
    int short_tile;                    // which of these, the last one, has fewer heads; -1: none
    int heads_of_short_tile;           // so many
    int kernel_rows;                   // query rows for which the kernel has room
    int query_box_tiles;               // half of the latent part's tiles where all are full, else one
    int inverse_heads;                 // 2^16 / heads_per_tile, rounded up: rows are divided by it
    int inverse_heads_of_short_tile;   // the same of heads_of_short_tile
    uint32_t inverse_tiles_per_token;  // 2^31 / tiles_per_token, rounded up; exact below 2^31 / divisor
    uint32_t inverse_kv_heads;
    int num_row_tiles;   // over all KV heads
    int first_row_tile;  // of this launch
    int arrivals_slot;   // which of the kernel's sets of arrival counters this launch uses
    bool causal;
    float softmax_scale;
    DType dtype;
};

// The copy engine's views, with tiles of 64 columns as a dimension of their own. A box of the query is a
// block's rows x DecodeParams::query_box_tiles, or one tile of the rope part; of the cache, a page's 64
// tokens x latent_box_tiles() of the latent part's tiles, or the rope tile.
struct QueryMaps {
    CUtensorMap nope;  // 64 columns x h_q x s_q x 8 tiles x b
    CUtensorMap pe;    // 64 columns x h_q x s_q x 1 tile x b
};
struct DecodeMaps {
    QueryMaps query[2];    // the second with the boxes of short tiles
    CUtensorMap k_latent;  // 64 columns x 64 tokens x h_kv x 9 tiles x pages
    CUtensorMap k_rope;    // likewise
};

// Tiles in a box of the latent part. Few boxes are better, but with many rows V's last quarter comes by
// itself.
constexpr int latent_box_tiles(int kernel_rows) {
    return kernel_rows == kTileRows ? kTilesQuarterV : kTilesHalfV;
}

// Pages of a sequence; a negative length counts as none.
__host__ __device__ inline int pages_of(int seq_len) {
    return seq_len <= 0 ? 0 : (static_cast<unsigned>(seq_len) - 1) / kPageSize + 1;
}

// The first part of the last half; the only part, if there is one. Few rows' kernel gives the parts before it
// a TPC each, and the planner leaves none of them idle while later ones are busy.
__host__ __device__ inline int first_of_last_half(int num_parts) {
    const int last = num_parts - 1, half = (num_parts + 1) / 2;
    return last < half ? last : half;
}

// The batch-invariant mode works on a sequence in chunks, from its first page on, and merges these in order.
// Their length is the same wherever the sequence is decoded, and a power of two: at level 1 about the root of
// its pages up to 16, then 8 up to 128, then 16; twice as much at level 2. Returns the power.
__host__ __device__ inline int chunk_log2(int pages, int level) {
    const int root = (std::bit_width(static_cast<unsigned>(pages > 1 ? pages - 1 : 0)) + 1) / 2;
    const int most = pages <= 128 ? 3 : 4;
    return (root < most ? root : most) + level - 1;
}

__host__ __device__ inline int num_chunks(int pages, int level) {
    const int log2 = chunk_log2(pages, level);
    return (pages + (1 << log2) - 1) >> log2;
}

// The most chunks of a sequence of up to so many pages: of the longest, or of one whose chunks are shorter.
inline int most_chunks(int max_pages, int level) {
    const int pages = std::max(1, max_pages);
    return std::max({num_chunks(pages, level), num_chunks(std::min(pages, 128), level),
                     num_chunks(std::min(pages, 16), level)});
}

void launch_plan(const PlanParams& params, cudaStream_t stream);
void launch_plan_chunks(const PlanParams& params, cudaStream_t stream);
void launch_decode(const DecodeParams& params, const DecodeMaps& maps, cudaStream_t stream);

}  // namespace mla

// Where a thread block finds its work: the splits of its part, and what its 64 rows are.
#pragma once

#include "../params.h"

namespace mla {

// One part's piece of one sequence: pages [page_begin, page_end).
struct Split {
    int seq;
    int seq_len;
    int page_begin;
    int page_end;
    int partial_slot;  // index into out_partial, or -1 where the split is the whole sequence

    __device__ bool is_partial() const { return partial_slot >= 0; }
    __device__ bool is_empty() const { return page_begin == page_end; }
};

// Calls `work` on each split of the part, in order. All roles of a block walk the same splits.
//
// What the plan and the lengths say is clamped to the arguments' shapes: a plan made for another batch gives
// wrong rows, but leads to no memory that is not the call's.
template <typename Work>
__device__ inline void for_each_split(const DecodeParams& params, int part, Work&& work) {
    const PartPlan plan = params.parts[part];
    const int first_seq = max(plan.first_seq, 0), last_seq = min(plan.last_seq, params.batch - 1);
    for (int seq = first_seq; seq <= last_seq; ++seq) {
        const int seq_len = params.seq_lens[seq];
        const int pages = min(pages_of(seq_len), params.max_pages);
        const int first_slot = params.num_splits[seq];
        const bool is_split = params.num_splits[seq + 1] - first_slot > 1;
        const int slot = first_slot + (seq == first_seq ? plan.first_split : 0);
        Split split;
        split.seq = seq;
        split.seq_len = min(seq_len, pages * kPageSize);
        split.page_end = seq == last_seq ? max(0, min(pages, plan.last_page_end)) : pages;
        split.page_begin = seq == first_seq ? max(0, min(split.page_end, plan.first_page)) : 0;
        split.partial_slot = is_split ? max(0, min(slot, params.batch + params.num_parts - 1)) : -1;
        work(split);
    }
}

// A query row: one head of one query token.
struct Row {
    int token;
    int head;
    bool valid;  // the last tile is padded to 64 rows
};

// The block's 64 rows of one KV head. Its rows are ordered by query token, then by head of the group.
struct RowTile {
    int first_row;
    int kv_head;
    int group;  // query heads per KV head

    __device__ RowTile(const DecodeParams& params, int block)
        : first_row(block / params.num_kv_heads * kTileRows),
          kv_head(block % params.num_kv_heads),
          group(params.num_heads / params.num_kv_heads) {}

    __device__ Row row(const DecodeParams& params, int row_of_tile) const {
        const int row = first_row + row_of_tile;
        const int token = row / group;
        return {token, kv_head * group + row - token * group, token < params.query_len};
    }
};

// How many of the sequence's keys the row may see; 0 or less means none.
__device__ inline int visible_keys(const DecodeParams& params, int seq_len, int token) {
    return params.causal ? seq_len - params.query_len + token + 1 : seq_len;
}

// Keys that every query token sees: below it no mask is needed.
__device__ inline int keys_visible_to_all(const DecodeParams& params, int seq_len) {
    return visible_keys(params, seq_len, 0);
}

}  // namespace mla

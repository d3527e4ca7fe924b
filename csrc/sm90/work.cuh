// Where a thread block finds its work: its row tile, and the splits of its part.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace mla {

// Which part a block works on. Blocks 2 k and 2 k + 1 run on the two SMs that share a way to memory: where
// plans may leave the last half of the parts idle, the busy ones are spread over every second block.
__device__ inline int part_of_block(const DecodeParams& params, bool half_may_idle) {
    const unsigned block = blockIdx.y;
    return half_may_idle ? block / 2 + block % 2 * first_of_last_half(params.num_parts) : block;
}

// In which order a part works on its sequences. The batch-invariant mode begins with the last one, so that
// the next part may go on with it at its own end.
enum Order { kForwards, kBackwards };
enum class Mode { kSplits, kBatchInvariant };
template <Mode kMode>
constexpr Order kOrderOf = kMode == Mode::kBatchInvariant ? kBackwards : kForwards;

// The plan of the block's part.
struct BlockPlan : PartPlan {
    int part;

    __device__ BlockPlan(const DecodeParams& params, bool half_may_idle)
        : PartPlan(params.parts[part_of_block(params, half_may_idle)]),
          part(part_of_block(params, half_may_idle)) {}

    // Where it starts: with which sequence, past the batch's end if it is idle, and at which page.
    template <Order kOrder>
    __device__ int start_seq() const {
        return kOrder == kForwards ? first_seq : max(first_seq, last_seq);
    }
    template <Order kOrder>
    __device__ int start_page() const {
        return kOrder == kForwards || first_seq == last_seq ? first_page : 0;
    }
};

// The block's rows of one KV head, up to 64: `tokens_per_tile` query tokens with `heads` heads each, in this
// order. What lies past the query is padding, at the end.
struct RowTile {
    int first_token;
    int kv_head;
    int first_head;  // of all heads
    int heads;
    int inverse_heads;  // as in DecodeParams
    bool is_short;      // has fewer heads than the others

    __device__ RowTile(const DecodeParams& params, int tile, bool is_only_one) {
        const int tile_of_head = divide(tile, params.inverse_kv_heads);
        const int token_tile = divide(tile_of_head, params.inverse_tiles_per_token);
        const int tile_of_token = tile_of_head - token_tile * params.tiles_per_token;
        first_token = token_tile * params.tokens_per_tile;
        kv_head = tile - tile_of_head * params.num_kv_heads;
        first_head = kv_head * params.heads_per_group + tile_of_token * params.heads_per_tile;
        is_short = !is_only_one && tile_of_token == params.short_tile;
        heads = is_short ? params.heads_of_short_tile : params.heads_per_tile;
        inverse_heads = is_short ? params.inverse_heads_of_short_tile : params.inverse_heads;
    }

    __device__ int tokens(const DecodeParams& params, int query_len) const {
        return min(params.tokens_per_tile, query_len - first_token);
    }

    // How many rows it has where a sequence has so many query tokens.
    __device__ int rows(const DecodeParams& params, int query_len) const {
        return heads * tokens(params, query_len);
    }

  private:
    __device__ static int divide(uint32_t value, uint32_t inverse) {
        return static_cast<int>(static_cast<uint64_t>(value) * inverse >> 31);
    }
};

// Whether several row tiles, and so several blocks, read the same pages.
__device__ inline bool share_pages(const DecodeParams& params) {
    return params.num_row_tiles > params.num_kv_heads;
}

// A sequence's query tokens: `length` of them, in this entry of the batch, from `token` on.
struct Query {
    int batch;
    int token;
    int length;

    __device__ Query(const DecodeParams& params, int seq) {
        if (params.cu_seqlens_q) {
            batch = 0;
            token = max(0, min(params.cu_seqlens_q[seq], params.num_tokens));
            const int end = max(0, min(params.cu_seqlens_q[seq + 1], params.num_tokens));
            length = min(end - token, params.query_len);
        } else {
            batch = seq;
            token = 0;
            length = params.query_len;
        }
    }
};

// One part's piece of one sequence: pages [page_begin, page_end).
struct Split {
    int seq;
    int seq_len;
    int page_begin;
    int page_end;
    Query query;

    __device__ bool is_empty() const { return page_begin >= page_end; }
    // Rows of the tile that hold a query: the first ones.
    __device__ int valid_rows(const DecodeParams& params, const RowTile& tile) const {
        return tile.rows(params, query.length);
    }
};

// Who walks the splits: a warp's lanes together, or one by itself, to which no other lane can give a value.
enum Walk { kWholeWarp, kOneLane };

// Calls `work` on each split of the part. All roles of a block walk the same splits.
//
// What the plan and the lengths say is clamped to the arguments' shapes: a plan made for another batch gives
// wrong rows, but leads to no memory that is not the call's. Nor does it leave blocks waiting (arrivals.cuh),
// as which blocks meet is up to the plan and to the lengths, which all of them see alike.
template <Order kOrder, Walk kWalk = kWholeWarp, typename Work>
__device__ inline void for_each_split(const DecodeParams& params, const BlockPlan& plan, const RowTile& tile,
                                      Work&& work) {
    // Tells the compiler that a warp's lanes stay together, all along the pages.
    const auto uniform = [](int value) { return kWalk == kWholeWarp ? ptx::uniform(value) : value; };
    const auto visit = [&](int seq) {
        const int seq_len = params.seq_lens[seq];
        const int pages = min(pages_of(seq_len), params.max_pages);
        const Query query(params, seq);
        if (tile.first_token >= query.length) return;
        const int page_begin = seq == plan.first_seq ? max(0, min(plan.first_page, params.max_pages)) : 0;
        const int page_end = seq == plan.last_seq ? min(pages, plan.last_page_end) : pages;
        work(Split{seq, min(seq_len, pages * kPageSize), uniform(page_begin), uniform(page_end), query});
    };
    const int last_seq = uniform(min(plan.last_seq, params.batch - 1));
    if constexpr (kOrder == kForwards) {
        for (int seq = uniform(max(plan.first_seq, 0)); seq <= last_seq; ++seq) visit(seq);
    } else {
        for (int seq = last_seq; seq >= uniform(max(plan.first_seq, 0)); --seq) visit(seq);
    }
}

// The number of the part's first split within its sequence.
__device__ inline int first_split_of(const BlockPlan& plan) {
    return max(0, min(plan.first_split, plan.part));
}

// What a split is of its sequence. If that has several, their results are partials, side by side in slots.
struct SplitPlace {
    int index;
    int num_splits;
    int first_slot;  // of split 0

    __device__ SplitPlace(int index, int num_splits, int first_slot)
        : index(index), num_splits(num_splits), first_slot(first_slot) {}
    __device__ SplitPlace(const DecodeParams& params, const BlockPlan& plan, const Split& split) {
        const bool is_first = split.seq == plan.first_seq;
        index = is_first ? first_split_of(plan) : 0;
        num_splits = is_first ? plan.first_splits : split.seq == plan.last_seq ? plan.last_splits : 1;
        num_splits = abs(num_splits);  // negative if sums are handed over: PiecePlace
        num_splits = max(index + 1, min(num_splits, params.num_parts - plan.part + index));
        first_slot = plan.first_slot + (!is_first && plan.first_splits != 1 ? 1 : 0) - index;
        first_slot = max(0, min(first_slot, params.num_slots - num_splits));
    }
    __device__ bool is_partial() const { return num_splits > 1; }
    __device__ int slot_of(int split) const { return first_slot + split; }
};

// A query row: one head of one query token.
struct Row {
    int token;
    int head;
    bool valid;
};

__device__ inline Row row_of(const DecodeParams& params, const RowTile& tile, const Split& split,
                             int row_of_tile) {
    const int token = row_of_tile * tile.inverse_heads >> 16;
    return {tile.first_token + token, tile.first_head + row_of_tile - token * tile.heads,
            row_of_tile < split.valid_rows(params, tile)};
}

// How many of the sequence's keys the query token may see; 0 or less means none.
__device__ inline int visible_keys(const DecodeParams& params, const Split& split, int token) {
    return params.causal ? split.seq_len - split.query.length + token + 1 : split.seq_len;
}

}  // namespace mla

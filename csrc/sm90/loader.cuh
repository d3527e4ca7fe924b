// The producer: one thread keeps the copy engine fetching queries and pages, ahead of the consumers. What is
// asked for in few, large boxes arrives sooner: a thread takes 40 ns to ask for one.
#pragma once

#include "ptx.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

// A part that reads little: of up to so many sequences, up to so many pages of each.
constexpr int kLittleSeqs = 2;
constexpr int kLittlePages = 32;

// Storage: a kernel's shared memory, with `q`, `k`, `pages` and `q_empty`. The query comes under a barrier of
// its own, `q_full`, or under those of its first page.
template <typename Storage>
class Loader {
  public:
    __device__ Loader(const DecodeParams& params, const DecodeMaps& maps, Storage& shared)
        : params_(params), maps_(maps), shared_(shared) {}

    // A split's query and its pages, each page as soon as the consumers give its place back.
    __device__ void load(const RowTile& tile, const Split& split) {
        const int* table = params_.block_table + split.seq * params_.block_table_stride;
        int page_index = split.is_empty() ? 0 : table[split.page_begin];
        const QueryPlace query(params_, split.seq);
        reads_little_ = is_read_little(split);
        for (int page = split.page_begin; page < split.page_end; ++page) {
            const int next_index = page + 1 < split.page_end ? table[page + 1] : 0;
            const bool with_query = page == split.page_begin;
            // The block's first query goes along with the page, or ahead of it. Later ones follow it: the
            // page need not wait until the query before was used.
            if (Storage::kQueryHasBarrier && with_query && is_first_) load_query(tile, query);
            load_group<kRope>(tile, page_index, with_query, query);
            load_group<kLeftV>(tile, page_index, with_query, query);
            load_group<kRightV>(tile, page_index, with_query, query);
            if (with_query && !is_first_) {
                ptx::barrier_wait(&shared_.q_empty, q_round_.parity);
                q_round_.next();
                load_query(tile, query);
            }
            is_first_ = false;
            page_index = next_index;
            stage_.next();
        }
    }

  private:
    // Whether the part reads so little, and so all parts do, that making room for it in the L2 would count:
    // what others left there may have to be written to memory first. The limits are measured, see NOTES.md.
    __device__ bool is_read_little(const Split& split) const {
        return params_.chunk_level == 0 && shared_.plan.last_seq - shared_.plan.first_seq < kLittleSeqs &&
               split.page_end - split.page_begin <= kLittlePages;
    }

    // A group of the page's tiles. A query without a barrier of its own counts under theirs; its tiles are
    // asked for here if it is the block's first, else by `load`.
    template <TileGroup kGroup>
    __device__ void load_group(const RowTile& tile, int page_index, bool with_query,
                               const QueryPlace& query) {
        constexpr int kFirst = first_tile(kGroup);
        ptx::barrier_wait(&shared_.pages.empty[stage_.slot][kGroup], stage_.parity ^ 1);
        const bool together = with_query && !Storage::kQueryHasBarrier;
        const int query_bytes = together ? query_tile_bytes() : 0;
        ptx::barrier_arrive_expect(full(kGroup), tiles_in(kGroup) * (kTileBytes + query_bytes));
        if (together && is_first_) load_query_group<kGroup>(tile, query);
        const CUtensorMap& map = kGroup == kRope ? maps_.k_rope : maps_.k_half;
        if (reads_little_) {
            ptx::load_box_evict_first(shared_.k[stage_.slot][kFirst], map, full(kGroup), 0, tile.kv_head,
                                      kFirst, page_index);
        } else {
            ptx::load_box(shared_.k[stage_.slot][kFirst], map, full(kGroup), 0, tile.kv_head, kFirst,
                          page_index);
        }
    }

    __device__ uint64_t* full(int group) { return &shared_.pages.full[stage_.slot][group]; }

    __device__ int query_tile_bytes() const {
        return params_.heads_per_tile * params_.tokens_per_tile * kRowBytes;
    }

    __device__ void load_query(const RowTile& tile, const QueryPlace& query) {
        if constexpr (Storage::kQueryHasBarrier)
            ptx::barrier_arrive_expect(&shared_.q_full, kTiles * query_tile_bytes());
        load_query_group<kRope>(tile, query);
        load_query_group<kLeftV>(tile, query);
        load_query_group<kRightV>(tile, query);
    }

    template <TileGroup kGroup>
    __device__ void load_query_group(const RowTile& tile, const QueryPlace& query) {
        uint64_t* barrier = full(kGroup);
        if constexpr (Storage::kQueryHasBarrier) barrier = &shared_.q_full;
#pragma unroll 1
        for (int t = 0; t < tiles_in(kGroup); t += params_.query_box_tiles)
            ptx::load_box(shared_.q[first_tile(kGroup) + t], kGroup == kRope ? maps_.q_pe : maps_.q_nope,
                          barrier, tile.first_head, query.token + tile.first_token,
                          kGroup == kRope ? 0 : first_tile(kGroup) + t, query.batch);
    }

    const DecodeParams& params_;
    const DecodeMaps& maps_;
    Storage& shared_;
    RingPosition<kStages> stage_;
    RingPosition<1> q_round_;  // of q_empty
    bool is_first_ = true;
    bool reads_little_;
};

}  // namespace mla

// The producer: one thread keeps the copy engine fetching queries and pages, ahead of the consumers.
#pragma once

#include "ptx.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

// A part that reads little: of up to so many sequences, up to so many pages of each.
constexpr int kLittleSeqs = 2;
constexpr int kLittlePages = 32;

// Storage: a kernel's shared memory, with `q`, `k`, `pages` and `q_empty`. The query comes under a barrier of
// its own, `q_full`, or tile by tile under those of its first page.
template <typename Storage>
class Loader {
  public:
    __device__ Loader(const DecodeParams& params, const DecodeMaps& maps, Storage& shared)
        : params_(params), maps_(maps), shared_(shared) {}

    // A split's query and its pages, each page as soon as the consumers give its place back.
    __device__ void load(const RowTile& tile, const Split& split) {
        const int* table = params_.block_table + split.seq * params_.block_table_stride;
        // Asked for before the length is known: entries past the last page are read, but not used.
        int page_index = split.page_begin < params_.max_pages ? table[split.page_begin] : 0;
        const QueryPlace query(params_, split.seq);
        reads_little_ = is_read_little(split);
        for (int page = split.page_begin; page < split.page_end; ++page) {
            const int next_index = page + 1 < split.page_end ? table[page + 1] : 0;
            const bool with_query = page == split.page_begin && split.begins_piece;
            if (with_query && !Storage::kQueryHasBarrier) expect_query();
            // The block's first query goes along with the page, or ahead of it. Later ones follow it: the
            // page need not wait until the query before was used.
            const bool along = with_query && is_first_ && !Storage::kQueryHasBarrier;
            if (with_query && is_first_ && Storage::kQueryHasBarrier) load_query(tile, query);
            load_tiles<kRopeTile, kRopeTile>(kRope, tile, page_index, along, query);
            load_tiles<0, kTilesHalfV - 1>(kLeftV, tile, page_index, along, query);
            load_tiles<kTilesHalfV, kTilesV - 1>(kRightV, tile, page_index, along, query);
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

    template <int kFirst, int kLast>
    __device__ void load_tiles(TileGroup group, const RowTile& tile, int page_index, bool with_query,
                               const QueryPlace& query) {
        wait_until_empty(group);
#pragma unroll
        for (int t = kFirst; t <= kLast; ++t) {
            if (with_query) load_query_tile(t, tile, query);
            ptx::barrier_arrive_expect(full(t), kTileBytes);
        }
        if (reads_little_) {
            load_boxes<kFirst, kLast, ptx::load_tensor_4d_evict_first>(tile, page_index);
        } else {
            load_boxes<kFirst, kLast, ptx::load_tensor_4d>(tile, page_index);
        }
    }

    template <int kFirst, int kLast, auto kLoad>
    __device__ void load_boxes(const RowTile& tile, int page_index) {
#pragma unroll 1
        for (int token = 0; token < kPageSize; token += kBoxTokens) {
#pragma unroll
            for (int t = kFirst; t <= kLast; ++t)
                kLoad(shared_.k[stage_.slot][t] + token * kRowBytes, maps_.k, full(t), t * kTileColumns,
                      token, tile.kv_head, page_index);
        }
    }

    __device__ uint64_t* full(int t) { return &shared_.pages.full[stage_.slot][t]; }

    __device__ void wait_until_empty(TileGroup group) {
        ptx::barrier_wait(&shared_.pages.empty[stage_.slot][group], stage_.parity ^ 1);
    }

    // Has the query's barrier, or its first page's, wait for its tiles.
    __device__ void expect_query() {
        const int bytes = params_.heads_per_tile * params_.tokens_per_tile * kRowBytes;
        if constexpr (Storage::kQueryHasBarrier) {
            ptx::barrier_arrive_expect(&shared_.q_full, kTiles * bytes);
        } else {
            for (int group = 0; group < kTileGroups; ++group) wait_until_empty(static_cast<TileGroup>(group));
#pragma unroll 1
            for (int t = 0; t < kTiles; ++t) ptx::barrier_expect(full(t), bytes);
        }
    }

    __device__ void load_query(const RowTile& tile, const QueryPlace& query) {
        if constexpr (Storage::kQueryHasBarrier)
            expect_query();  // not before: the query before may be on its way
#pragma unroll 1
        for (int i = 0; i < kTiles; ++i) load_query_tile(i == 0 ? kRopeTile : i - 1, tile, query);
    }

    __device__ void load_query_tile(int t, const RowTile& tile, const QueryPlace& query) {
        uint64_t* barrier = full(t);
        if constexpr (Storage::kQueryHasBarrier) barrier = &shared_.q_full;
        ptx::load_tensor_4d(shared_.q[t], t == kRopeTile ? maps_.q_pe : maps_.q_nope, barrier,
                            t == kRopeTile ? 0 : t * kTileColumns, tile.first_head,
                            query.token + tile.first_token, query.batch);
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

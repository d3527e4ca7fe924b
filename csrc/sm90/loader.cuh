// The producer: one thread keeps the copy engine fetching queries and pages, ahead of the consumers. What is
// asked for in few, large boxes arrives sooner.
#pragma once

#include "first_page.cuh"
#include "ptx.cuh"
#include "tiles.cuh"
#include "work.cuh"

namespace mla {

// A call that reads little: up to so many pages of each KV head, 295 MB.
constexpr int kLittlePages = 4000;

// Of a short tile not its own, but the others': to choose would cost more than that saves.
__device__ inline void prefetch_maps(const DecodeMaps& maps) {
    ptx::prefetch_map(maps.k_rope);
    ptx::prefetch_map(maps.k_latent);
    ptx::prefetch_map(maps.query[0].nope);
    ptx::prefetch_map(maps.query[0].pe);
}

// Storage: a kernel's shared memory, with `q`, `k`, `pages` and `q_empty`. The query comes under a barrier of
// its own, `q_full`, or under those of its first page.
template <typename Storage, Mode kMode>
class Loader {
  public:
    __device__ Loader(const DecodeParams& params, const DecodeMaps& maps, Storage& shared,
                      const BlockPlan& plan, const RowTile& tile)
        : params_(params), maps_(maps), shared_(shared), plan_(plan), tile_(tile) {}

    // Asks for what the first page's request takes. By the lane that then calls `load_all`.
    __device__ void begin() {
        const int seq = plan_.template start_seq<kOrder>(), page = plan_.template start_page<kOrder>();
        if (seq < 0 || seq >= params_.batch || page < 0 || page >= params_.max_pages) return;
        ptx::prefetch(params_.seq_lens + seq);
        first_index_ = params_.block_table[seq * params_.block_table_stride + page];
        if (Storage::kHalfMayIdle && params_.batch <= params_.num_parts)
            first_seq_of_half_ = params_.parts[first_of_last_half(params_.num_parts)].first_seq;
        // The query to the L2, by one of the blocks that share it. A ragged one lies behind another trip.
        if (page == 0 && !params_.cu_seqlens_q) prefetch_query(seq);
    }

    __device__ void load_all() {
        for_each_split<kOrder, kOneLane>(params_, plan_, tile_, [&](const Split& split) { load(split); });
        const int seq = pages_asked_for_ > 0 ? plan_.template start_seq<kOrder>() : -1;
        first_page_of_block(params_) = {seq, plan_.template start_page<kOrder>(), first_index_, 0};
    }

  private:
    static constexpr Order kOrder = kOrderOf<kMode>;
    static constexpr bool kQueryHasBarrier = Storage::kQueryHasBarrier;
    using Groups = typename Storage::Groups;
    using QueryGroups = PageGroups<0>;

    // A split's query and its pages, each page as soon as the consumers give its place back.
    __device__ void load(const Split& split) {
        const int* table = params_.block_table + split.seq * params_.block_table_stride;
        int page_index = first_index_;
        if (pages_asked_for_ > 0 || split.seq != plan_.template start_seq<kOrder>())
            page_index = split.is_empty() ? 0 : table[split.page_begin];
        evicts_first_ = kMode == Mode::kBatchInvariant || is_read_little(split);
        for (int page = split.page_begin; page < split.page_end; ++page) {
            const int next_index = page + 1 < split.page_end ? table[page + 1] : 0;
            const bool with_query = page == split.page_begin, is_first = pages_asked_for_ == 0;
            // The block's first query goes along with the page, or ahead of it. Later ones follow it: the
            // page need not wait until the query before was used.
            if (kQueryHasBarrier && is_first) load_query(split.query);
            if (is_first) first_index_ = page_index;  // may be of a later sequence, if the first has no page
            if (Storage::kHalfMayIdle && pages_asked_for_ >= kStages && half_is_idle()) {
                ptx::barrier_wait(full(kRightV), stage_.parity ^ 1);  // the page is there that has the place
                prefetch_page(page_index);
            }
            load_group<kRope>(page_index, with_query, split.query);
            load_group<kLeftV>(page_index, with_query, split.query);
            load_group<kRightV>(page_index, with_query, split.query);
            if constexpr (Groups::tiles_in(kLateV) > 0) {
                // Its place will be free late: the L2 fetches it meanwhile, unless sums of chunks are to stay
                // there.
                if (kMode == Mode::kSplits && pages_asked_for_ >= kStages && share_pages(params_) &&
                    blockIdx.x % 2 == 0)
                    prefetch_group<kLateV>(page_index);
                load_group<kLateV>(page_index, with_query, split.query);
            }
            if (with_query && !is_first) {
                ptx::barrier_wait(&shared_.q_empty, q_round_.parity);
                q_round_.next();
                load_query(split.query);
            }
            ++pages_asked_for_;
            page_index = next_index;
            stage_.next();
        }
    }

    // Whether the call reads so little, by what this part does, that making room for it in the L2 would
    // count: what others left there may have to be written to memory first. The limit is measured, see
    // NOTES.md. Sequences up to the part's last one are taken to be as long as this one.
    __device__ bool is_read_little(const Split& split) const {
        const unsigned pages = split.page_end - split.page_begin, seqs = plan_.last_seq - split.seq;
        const unsigned left = seqs == 0 ? pages : seqs * pages + plan_.last_page_end;
        return params_.num_parts * (pages_asked_for_ + left) <= kLittlePages;
    }

    // Whether half of the SMs are. Then memory has time to bring a page to the L2 while its place is in use;
    // else that costs 1 to 3 %. The last half's first part tells, as layout.py's idle_before leaves none idle
    // up to it; with more sequences than parts it says nothing of the others.
    __device__ bool half_is_idle() const { return first_seq_of_half_ >= params_.batch; }

    __device__ void prefetch_page(int page_index) {
        prefetch_group<kRope>(page_index);
        prefetch_group<kLeftV>(page_index);
        prefetch_group<kRightV>(page_index);
    }

    template <TileGroup kGroup>
    __device__ void prefetch_group(int page_index) {
        for_each_box<kGroup>([&](const CUtensorMap& map, int tile) {
            ptx::prefetch_box(map, 0, tile_.kv_head, tile, page_index, ptx::evict_first());
        });
    }

    // Calls `work` with each box of a group of the page's tiles: by which map, and its first tile.
    template <TileGroup kGroup, typename Work>
    __device__ void for_each_box(Work&& work) {
        constexpr int kFirst = Groups::first_tile(kGroup);
        constexpr int kStep = kGroup == kRope ? 1 : Storage::kLatentBoxTiles;
        static_assert(Groups::tiles_in(kGroup) % kStep == 0);
#pragma unroll
        for (int tile = kFirst; tile < kFirst + Groups::tiles_in(kGroup); tile += kStep)
            work(kGroup == kRope ? maps_.k_rope : maps_.k_latent, tile);
    }

    // A group of the page's tiles. A query without a barrier of its own counts under theirs, all of the
    // query's right half under that of kRightV; its tiles are asked for here if it is the block's first, else
    // by `load`.
    template <TileGroup kGroup>
    __device__ void load_group(int page_index, bool with_query, const Query& query) {
        // All wait for the first page, which a second one would delay: it follows group by group.
        if (pages_asked_for_ == 1) ptx::barrier_wait(&shared_.pages.full[0][kGroup], 0);
        ptx::barrier_wait(&shared_.pages.empty[stage_.slot][kGroup], stage_.parity ^ 1);
        const bool together = with_query && !kQueryHasBarrier;
        const int query_bytes = together ? QueryGroups::tiles_in(kGroup) * query_tile_bytes() : 0;
        ptx::barrier_arrive_expect(full(kGroup), Groups::tiles_in(kGroup) * kTileBytes + query_bytes);
        if (together && pages_asked_for_ == 0) load_query_group<kGroup>(query);
        for_each_box<kGroup>([&](const CUtensorMap& map, int tile) {
            uint8_t* to = shared_.k[stage_.slot][tile];
            if (evicts_first_) {
                ptx::load_box(to, map, full(kGroup), 0, tile_.kv_head, tile, page_index, ptx::evict_first());
            } else {
                ptx::load_box(to, map, full(kGroup), 0, tile_.kv_head, tile, page_index);
            }
        });
    }

    __device__ uint64_t* full(int group) { return &shared_.pages.full[stage_.slot][group]; }

    __device__ int query_tile_bytes() const { return tile_.heads * params_.tokens_per_tile * kRowBytes; }

    __device__ void load_query(const Query& query) {
        if constexpr (kQueryHasBarrier)
            ptx::barrier_arrive_expect(&shared_.q_full, kTiles * query_tile_bytes());
        load_query_group<kRope>(query);
        load_query_group<kLeftV>(query);
        load_query_group<kRightV>(query);
    }

    // A short tile's by the others' maps, too: a few heads too many.
    __device__ void prefetch_query(int seq) {
        ptx::prefetch_box(maps_.query[0].pe, tile_.first_head, tile_.first_token, 0, seq);
#pragma unroll 1
        for (int t = 0; t < kTilesV; t += params_.query_box_tiles)
            ptx::prefetch_box(maps_.query[0].nope, tile_.first_head, tile_.first_token, t, seq);
    }

    template <TileGroup kGroup>
    __device__ void load_query_group(const Query& query) {
        constexpr int kFirst = QueryGroups::first_tile(kGroup);
        const QueryMaps& maps = maps_.query[tile_.is_short];
        uint64_t* barrier = full(kGroup);
        if constexpr (kQueryHasBarrier) barrier = &shared_.q_full;
#pragma unroll 1
        for (int t = 0; t < QueryGroups::tiles_in(kGroup); t += params_.query_box_tiles)
            ptx::load_box(shared_.q[kFirst + t], kGroup == kRope ? maps.pe : maps.nope, barrier,
                          tile_.first_head, query.token + tile_.first_token, kGroup == kRope ? 0 : kFirst + t,
                          query.batch);
    }

    const DecodeParams& params_;
    const DecodeMaps& maps_;
    Storage& shared_;
    const BlockPlan& plan_;
    const RowTile& tile_;
    RingPosition<kStages> stage_;
    RingPosition<1> q_round_;  // of q_empty
    int pages_asked_for_ = 0;
    int first_index_ = 0;
    int first_seq_of_half_ = 0;  // of the first part of the last half
    bool evicts_first_;  // pages leave the L2 first: little is read, or sums of chunks are to stay there
};

}  // namespace mla

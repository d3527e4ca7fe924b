// The two consumer warpgroups. The first computes scores and softmax and multiplies the left half of V; the
// second receives the weights and multiplies the right half.
#pragma once

#include "../values.cuh"
#include "epilogue.cuh"
#include "products.cuh"
#include "storage.cuh"

namespace mla::many_rows {

// scores (64 x 64) = q k^T, group by group of tiles as the page arrives.
template <typename T>
__device__ inline void compute_scores(Storage& shared, int slot, uint32_t parity, float (&scores)[32]) {
    const uint32_t q = wgmma::descriptor(shared.q, 0), k = wgmma::descriptor(shared.k[slot], 0);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        const int tile = i == 0 ? kRopeTile : i - 1;
        const int group = Storage::Groups::beginning_with(tile);
        if (group < kTileGroups) ptx::barrier_wait(&shared.pages.full[slot][group], parity);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint32_t at = tile * kTileBytes + step * 32;
            Product<T>::scores(scores, wgmma::advance(q, at), wgmma::advance(k, at), i + step > 0);
        }
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(scores);
}

// A thread's values of a product's 128 columns, a quarter of V's.
constexpr int kValuesQuarterV = 64;

// Starts kQuarters of output (64 x 128) = weights (64 x 64) v, added to what it was if `accumulate`; v are
// tiles of the page, its rows are tokens.
template <typename T, int kQuarters>
__device__ inline void start_output(const uint32_t (&weights)[16], const void* v_tiles, bool accumulate,
                                    float* output) {
    const uint32_t v = wgmma::descriptor(v_tiles, kTileBytes);
    wgmma::pin<kQuarters * kValuesQuarterV>(output);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < kQuarters; ++i)
            Product<T>::output(output + i * kValuesQuarterV, &weights[4 * step],
                               wgmma::advance(v, i * kTilesQuarterV * kTileBytes + step * 16 * kRowBytes),
                               accumulate || step > 0);
    wgmma::commit();
}

__device__ inline void finish_output(float (&output)[128]) {
    wgmma::wait<0>();
    wgmma::pin(output);
}

__device__ inline void rescale_output(float (&output)[128], float2 scale) {
    if (__any_sync(~0u, scale.x != 1.f || scale.y != 1.f)) scale_output(output, scale);
}

// The A fragments of 16 tokens are the scores' columns in the order in which they already lie.
template <typename T>
__device__ inline void pack_weights(const float (&scores)[32], uint32_t (&weights)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1], T());
}

// The first consumer tells the second by how much to scale the output, and a page's weights. These travel in
// the place of the page's rope tile, which the scores no longer need. The two hold the same rows in the same
// threads: a thread leaves its registers where its counterpart picks them up, without layout or bank
// conflict.
//
// Only the arrival needs a barrier. The place is free again when the stage's next page has arrived there, for
// which the second consumer had to give the tile back.
__device__ inline void hand_over(Storage& shared, int stage, const uint32_t (&weights)[16], float2 scale) {
    const int thread = threadIdx.x % kWarpgroup;
    auto* fragments = reinterpret_cast<uint4*>(shared.k[stage][kRopeTile]) + thread;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        fragments[i * kWarpgroup] =
            make_uint4(weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3]);
    shared.scale[stage][thread] = scale;
    ptx::barrier_arrive(&shared.weights_full[stage]);
}

__device__ inline float2 take_over(Storage& shared, int slot, uint32_t parity, uint32_t (&weights)[16]) {
    const int thread = threadIdx.x % kWarpgroup;
    ptx::barrier_wait(&shared.weights_full[slot], parity);
    const auto* fragments = reinterpret_cast<const uint4*>(shared.k[slot][kRopeTile]) + thread;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 fragment = fragments[i * kWarpgroup];
        weights[4 * i] = fragment.x;
        weights[4 * i + 1] = fragment.y;
        weights[4 * i + 2] = fragment.z;
        weights[4 * i + 3] = fragment.w;
    }
    return shared.scale[slot][thread];
}

// The same for what ends a split, in the stage of its last page.
__device__ inline void hand_over_end(Storage& shared, int stage, const SplitEnd& end) {
    shared.end[stage][threadIdx.x % kWarpgroup] = end;
    ptx::barrier_arrive(&shared.end_full[stage]);
}

// `parities`: bit i is that of stage i, for not every page ends a split.
__device__ inline SplitEnd take_over_end(Storage& shared, int stage, uint32_t& parities) {
    ptx::barrier_wait(&shared.end_full[stage], parities >> stage & 1);
    parities ^= 1 << stage;
    return shared.end[stage][threadIdx.x % kWarpgroup];
}

// What a consumer keeps from one split to the next.
struct ConsumerState {
    RingPosition<kStages> stage;
    uint32_t end_parities = 0;
};

// Gives a consumer's half of V of the stage's page back.
__device__ inline void give_back_page(Storage& shared, int consumer, ConsumerState& state) {
    warp_arrive(&shared.pages.empty[state.stage.slot][consumer == kLeft ? kLeftV : kRightV]);
    if (consumer == kRight) warp_arrive(&shared.pages.empty[state.stage.slot][kLateV]);
    state.stage.next();
}

// Scores, softmax and the left half of the output, over the pages of a split.
template <typename T>
__device__ inline SplitEnd consume_scores_and_left(const DecodeParams& params, Storage& shared,
                                                   const RowTile& tile, const Split& split, bool ends_query,
                                                   ConsumerState& state, float (&output)[128]) {
    OnlineSoftmax<T> softmax(params.softmax_scale);
    float scores[32];
    uint32_t weights[16];
    int visible[2];
    for (int h = 0; h < 2; ++h)
        visible[h] =
            visible_keys(params, split, row_of(params, tile, split, first_row_of_thread() + 8 * h).token);
    const int visible_to_all = visible_keys(params, split, 0);
    for (int page = split.page_begin; page < split.page_end; ++page) {
        const int first_key = page * kPageSize, slot = state.stage.slot;
        const bool is_last = page + 1 == split.page_end;
        compute_scores<T>(shared, slot, state.stage.parity, scores);
        sync_warpgroup(kLeft);  // no warp's scores read the rope tile now, and the weights may take its place
        if (threadIdx.x % kWarpgroup == 0) ptx::barrier_arrive(&shared.scored[slot]);
        if (is_last && ends_query) warp_arrive(&shared.q_empty);

        if (first_key + kPageSize > visible_to_all) mask_scores(scores, first_key, visible);
        const float2 scale = softmax.update(scores);
        pack_weights<T>(scores, weights);
        hand_over(shared, slot, weights, scale);

        rescale_output(output, scale);  // at the first page what is there does not count: no branch for that
        if (split.seq_len < first_key + kPageSize)
            zero_values_past_end<kTilesHalfV>(&shared.k[slot][0], split.seq_len - first_key, kLeft);
        start_output<T, 2>(weights, shared.k[slot][0], page > split.page_begin, output);
        finish_output(output);
        if (is_last) break;  // the page is given back after the output is stored
        give_back_page(shared, kLeft, state);
    }
    const SplitEnd end = softmax.finish();
    if (!split.is_empty()) hand_over_end(shared, state.stage.slot, end);
    return end;
}

// The right half of the output, with the weights that the other consumer hands over. Where blocks share their
// pages, so that these come fast, the last quarter of V waits for the next page's scores: it is multiplied
// beside their softmax, when the tensor cores are idle.
template <typename T>
__device__ inline SplitEnd consume_right(const DecodeParams& params, Storage& shared, const Split& split,
                                         ConsumerState& state, float (&output)[128]) {
    if (split.is_empty()) return {};
    uint32_t weights[16];
    for (int page = split.page_begin;; ++page) {
        const int first_key = page * kPageSize, slot = state.stage.slot;
        const bool accumulates = page > split.page_begin, is_last = page + 1 == split.page_end;
        uint8_t (*v_tiles)[kTileBytes] = &shared.k[slot][kTilesHalfV];
        // The weights come later anyway, but synccheck asks that each phase is waited for.
        ptx::barrier_wait(&shared.scored[slot], state.stage.parity);
        const float2 scale = take_over(shared, slot, state.stage.parity, weights);
        rescale_output(output, scale);
        ptx::barrier_wait(&shared.pages.full[slot][kRightV], state.stage.parity);
        // The last quarter, too: it is there, as its scores are.
        if (split.seq_len < first_key + kPageSize)
            zero_values_past_end<kTilesHalfV>(v_tiles, split.seq_len - first_key, kRight);
        start_output<T, 1>(weights, v_tiles, accumulates, output);
        // The copy engine may overwrite the weights' place once they have been written and read for good: the
        // products have the registers, and the fence orders this thread's reads before the engine's writes.
        ptx::fence_async_proxy();
        warp_arrive(&shared.pages.empty[slot][kRope]);
        finish_output(output);
        if (!is_last) {
            warp_arrive(&shared.pages.empty[slot][kRightV]);
            auto next = state.stage;
            next.next();
            if (share_pages(params)) ptx::barrier_wait(&shared.scored[next.slot], next.parity);
        }
        ptx::barrier_wait(&shared.pages.full[slot][kLateV], state.stage.parity);
        start_output<T, 1>(weights, v_tiles[kTilesQuarterV], accumulates, output + kValuesQuarterV);
        finish_output(output);
        if (is_last) return take_over_end(shared, slot, state.end_parities);
        warp_arrive(&shared.pages.empty[slot][kLateV]);
        state.stage.next();
    }
}

// Stores a split's result, merged already if this block has what it takes. `v_tiles`: see store_rows.
template <typename T>
__device__ inline void finish_split(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                    const Split& split, const SplitPlace& place, bool is_joined,
                                    const SplitEnd& end, int consumer, uint8_t* v_tiles,
                                    float (&output)[128]) {
    const Partial partial(params, tile, place.slot_of(place.index));
    const bool is_mine = is_joined || !place.is_partial();
    if (!is_mine)
        for_each_pair(partial, split.valid_rows(params, tile), consumer,
                      [&](int, float2* to, int i) { *to = make_float2(output[i], output[i + 1]); });
    if (consumer == kLeft)
        store_weight_sums(params, tile, split, end, place.is_partial() ? partial.weight_sums : nullptr);
    if (place.is_partial()) arrive(params, shared.plan, place, consumer);
    if (is_joined) {
        wait_for_all(params, shared.plan, shared.phases, split, place, consumer);
        add_other_split(params, tile, split, place, end, consumer, output);
    }
    if (!is_mine) return;
    if (split.is_empty()) {
        store_zeros<T>(params, tile, split, consumer);
    } else {
        if (!is_joined) scale_output(output, end.inverse());
        store_rows<T>(params, tile, split, output, consumer, v_tiles);
    }
}

// A consumer's half of a split, from its pages to its result in memory.
template <typename T>
__device__ inline void consume_split(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                     const Split& split, int consumer, ConsumerState& state) {
    float output[128];
    const SplitPlace place(params, shared.plan, split);
    const bool is_joined = is_merged_here(params, shared.plan, place, consumer);
    const SplitEnd end = consumer == kLeft
                             ? consume_scores_and_left<T>(params, shared, tile, split, true, state, output)
                             : consume_right<T>(params, shared, split, state, output);
    uint8_t* v_tiles = shared.k[state.stage.slot][consumer * kTilesHalfV];
    finish_split<T>(params, shared, tile, split, place, is_joined, end, consumer, v_tiles, output);
    if (!split.is_empty()) give_back_page(shared, consumer, state);
}

}  // namespace mla::many_rows

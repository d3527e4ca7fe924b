// The two consumer warpgroups. They score pages in turns; the weights of each page both multiply, each with
// its half of the columns of V, and share one softmax. While one scores a page, the other may still be at the
// output of the page before.
#pragma once

#include "../values.cuh"
#include "epilogue.cuh"
#include "products.cuh"

namespace mla::few_rows {

// scores (64 keys, kRows) = k q^T, group by group of tiles as the page arrives.
template <typename T, int kRows>
__device__ inline void compute_scores(Storage<kRows>& shared, int stage, uint32_t parity,
                                      float (&scores)[kRows / 2]) {
    const uint32_t k = wgmma::descriptor(shared.k[stage], 0), q = wgmma::descriptor(shared.q, 0);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        const int tile = i == 0 ? kRopeTile : i - 1;
        const int group = Storage<kRows>::Groups::beginning_with(tile);
        if (group < kTileGroups) ptx::barrier_wait(&shared.pages.full[stage][group], parity);
#pragma unroll
        for (int step = 0; step < 4; ++step)
            Product<T, kRows>::scores(scores, wgmma::advance(k, tile * kTileBytes + step * 32),
                                      wgmma::advance(q, tile * kRows * kRowBytes + step * 32), i + step > 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(scores);
}

// To shared memory as the second product's factor: a line of 64 keys for each row, swizzled.
template <typename T, int kRows>
__device__ inline void store_weights(const float (&scores)[kRows / 2], uint8_t* weights) {
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int row = lane / 16 * 8 + lane % 8, segment = 2 * warp + lane / 8 % 2;
    uint8_t* at = weights + row * kRowBytes + (segment ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < kRows / 2; i += 8)
        ptx::store_matrices_transposed(at + 2 * i * kRowBytes, pack_matrices<T>(&scores[i]));
}

// Starts output (256 columns, kRows) += v^T weights^T, of four tiles of the page.
template <typename T, int kRows>
__device__ inline void start_output(const void* v_tiles, const void* weights, HalfOutput<kRows>& output) {
    const uint32_t v = wgmma::descriptor(v_tiles, 0), w = wgmma::descriptor(weights, 0);
#pragma unroll
    for (int t = 0; t < kTilesHalfV; ++t) wgmma::pin(output[t]);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t)
            Product<T, kRows>::output(output[t], wgmma::advance(v, t * kTileBytes + step * 16 * kRowBytes),
                                      wgmma::advance(w, step * 32));
    wgmma::commit();
}

template <int kRows>
__device__ inline void clear(HalfOutput<kRows>& output) {
#pragma unroll
    for (int t = 0; t < kTilesHalfV; ++t)
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) output[t][i] = 0.f;
}

template <int kRows>
__device__ inline void pin(HalfOutput<kRows>& output) {
#pragma unroll
    for (int t = 0; t < kTilesHalfV; ++t) wgmma::pin(output[t]);
}

// Keys that a row may not see get no weight, by selection: the score may be NaN.
template <int kRows>
__device__ inline void mask_scores(const DecodeParams& params, const RowTile& tile, const Split& split,
                                   int first_key, float (&scores)[kRows / 2]) {
    const int key = first_key + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int v = 0; v < kRows / 4; ++v) {
        const int visible = visible_keys(params, split, row_of(params, tile, split, row_of_value(v)).token);
        if (key >= visible) scores[first_score(v)] = -INFINITY;
        if (key + 8 >= visible) scores[first_score(v) + 2] = -INFINITY;
    }
}

// A page that this consumer scores: its weights to shared memory, for both.
template <typename T, int kRows>
__device__ inline void score_page(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                  const Split& split, int page, int consumer, uint32_t parity,
                                  OnlineSoftmax<T, kRows>& softmax, HalfOutput<kRows>& output) {
    const int first_key = page * kPageSize, stage = consumer;
    float scores[kRows / 2];
    compute_scores<T, kRows>(shared, stage, parity, scores);
    warp_arrive(&shared.pages.empty[stage][kRope]);
    if (page + kConsumers >= split.page_end) warp_arrive(&shared.q_empty);
    if (first_key + kPageSize > visible_keys(params, split, 0))
        mask_scores<kRows>(params, tile, split, first_key, scores);
    bool raises = page == split.page_begin;
    if (!raises) raises = any_of_warpgroup(consumer, softmax.is_outgrown(scores));
    raises = __any_sync(~0u, raises);  // so that the compiler knows that a warp's lanes stay together
    if (raises) {
        float rescale[kRows / 4];
        softmax.raise(scores, shared.page_max[consumer], consumer, rescale);
        rescale_output<kRows>(output, rescale);
    }
    softmax.weigh(scores, shared.max[stage]);
    if (threadIdx.x % kWarpgroup == 0) shared.raised[stage] = raises;
    store_weights<T, kRows>(scores, shared.weights[stage]);
    ptx::fence_async_proxy();
    ptx::barrier_arrive(&shared.weights_full[stage]);
}

// A page, from its scores to this consumer's half of the output, which then is given back.
template <typename T, int kRows>
__device__ inline void consume_page(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                    const Split& split, int page, int consumer, ConsumerState& state,
                                    OnlineSoftmax<T, kRows>& softmax, HalfOutput<kRows>& output) {
    const int stage = state.stage.slot;
    uint8_t (*v_tiles)[kTileBytes] = &shared.k[stage][consumer * kTilesHalfV];
    if (stage == consumer)
        score_page<T, kRows>(params, shared, tile, split, page, consumer, state.stage.parity, softmax,
                             output);
    ptx::barrier_wait(&shared.weights_full[stage], state.stage.parity);
    if (stage != consumer) {
        if (__any_sync(~0u, shared.raised[stage])) {
            float rescale[kRows / 4];
            softmax.follow(shared.max[stage], rescale);
            rescale_output<kRows>(output, rescale);
        }
        ptx::barrier_wait(&shared.pages.full[stage][consumer], state.stage.parity);
    }
    if (split.seq_len < (page + 1) * kPageSize)
        zero_values_past_end<kTilesHalfV>(v_tiles, split.seq_len - page * kPageSize, consumer);
    start_output<T, kRows>(v_tiles, shared.weights[stage], output);
    wgmma::wait<0>();
    warp_arrive(&shared.pages.empty[stage][consumer]);
    pin<kRows>(output);
    state.stage.next();
}

// A split, from its pages to its result in memory.
template <typename T, int kRows>
__device__ inline void consume_split(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                     const Split& split, int consumer, ConsumerState& state) {
    HalfOutput<kRows> output;
    const SplitPlace place(params, shared.plan, split);
    const bool is_joined = is_merged_here(params, shared.plan, place, consumer);
    clear<kRows>(output);
    OnlineSoftmax<T, kRows> softmax(params.softmax_scale);
    if (!split.is_empty()) {
        ptx::barrier_wait(&shared.q_full, state.query_parity);
        state.query_parity ^= 1;
        if (split.page_end - split.page_begin == 1 && state.stage.slot != consumer)
            warp_arrive(&shared.q_empty);  // it scores none of the pages
        for (int page = split.page_begin; page < split.page_end; ++page)
            consume_page<T, kRows>(params, shared, tile, split, page, consumer, state, softmax, output);
    }
    finish_split<T, kRows>(params, shared, tile, split, place, is_joined, consumer, state, softmax, output);
}

}  // namespace mla::few_rows

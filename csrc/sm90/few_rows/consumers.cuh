// The two consumer warpgroups: each works on every second page, from scores to output, with a softmax and an
// output of its own. While one computes weights, the other keeps the tensor cores busy.
#pragma once

#include "../values.cuh"
#include "epilogue.cuh"
#include "products.cuh"

namespace mla::few_rows {

// What a consumer keeps from one split to the next.
struct ConsumerState {
    uint32_t page_parity = 0;
    uint32_t query_parity = 0;
    uint32_t meeting_parity = 0;
    int pages = 0;  // of the part, both consumers' together
};

// scores (64 keys, kRows) = k q^T, group by group of tiles as the page arrives.
template <typename T, int kRows>
__device__ inline void compute_scores(Storage<kRows>& shared, int stage, uint32_t parity,
                                      float (&scores)[kRows / 2]) {
    const uint32_t k = wgmma::descriptor(shared.k[stage], 0), q = wgmma::descriptor(shared.q, 0);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        const int tile = i == 0 ? kRopeTile : i - 1;
        if (tile % kTilesHalfV == 0) ptx::barrier_wait(&shared.pages.full[stage][group_of(tile)], parity);
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
__device__ inline void rescale_output(HalfOutput<kRows>& output, const float (&rescale)[kRows / 4]) {
#pragma unroll
    for (int t = 0; t < kTilesHalfV; ++t)
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) output[t][i] *= rescale[i / 4 * 2 + i % 2];
}

template <int kRows>
__device__ inline bool is_rescaled(const float (&rescale)[kRows / 4]) {
    bool changed = false;
#pragma unroll
    for (int v = 0; v < kRows / 4; ++v) changed |= rescale[v] != 1.f;
    return __any_sync(~0u, changed);
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
        const int at = v / 2 * 4 + v % 2;
        if (key >= visible) scores[at] = -INFINITY;
        if (key + 8 >= visible) scores[at + 2] = -INFINITY;
    }
}

// A page, from its scores to the output, and given back. `own` and `others`: the columns that this consumer
// and that the other one will finish.
template <typename T, int kRows>
__device__ inline void consume_page(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                    const Split& split, int page, int visible_to_all, int consumer,
                                    ConsumerState& state, OnlineSoftmax<kRows>& softmax,
                                    HalfOutput<kRows>& own, HalfOutput<kRows>& others) {
    const int first_key = page * kPageSize, stage = consumer;
    float scores[kRows / 2], rescale[kRows / 4];
    compute_scores<T, kRows>(shared, stage, state.page_parity, scores);
    state.page_parity ^= 1;
    warp_arrive(&shared.pages.empty[stage][kRope]);
    if (page + kConsumers >= split.page_end) warp_arrive(&shared.q_empty);

    if (first_key + kPageSize > visible_to_all) mask_scores<kRows>(params, tile, split, first_key, scores);
    softmax.update(scores, rescale, shared.page_max[consumer], consumer);
    store_weights<T, kRows>(scores, shared.weights[consumer]);
    if (split.seq_len < first_key + kPageSize) {
        zero_values_past_end<kTilesV>(shared.k[stage], split.seq_len - first_key, consumer);
    } else {
        ptx::fence_async_proxy();
        sync_warpgroup(consumer);
    }
    if (is_rescaled<kRows>(rescale)) {
        rescale_output<kRows>(own, rescale);
        rescale_output<kRows>(others, rescale);
    }
    const int other = 1 - consumer;
    start_output<T, kRows>(shared.k[stage][consumer * kTilesHalfV], shared.weights[consumer], own);
    start_output<T, kRows>(shared.k[stage][other * kTilesHalfV], shared.weights[consumer], others);
    wgmma::wait<1>();
    warp_arrive(&shared.pages.empty[stage][consumer]);
    wgmma::wait<0>();
    warp_arrive(&shared.pages.empty[stage][other]);
    pin<kRows>(own);
    pin<kRows>(others);
}

// A split, from its pages to its result in memory.
template <typename T, int kRows>
__device__ inline void consume(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                               const Split& split, int consumer, ConsumerState& state) {
    HalfOutput<kRows> own, others;
    clear<kRows>(own);
    clear<kRows>(others);
    OnlineSoftmax<kRows> softmax(params.softmax_scale);
    if (!split.is_empty()) {
        ptx::barrier_wait(&shared.q_full, state.query_parity);
        state.query_parity ^= 1;
        const int visible_to_all = visible_keys(params, split, 0);
        int page = split.page_begin + (state.pages + consumer) % kConsumers;
        if (page >= split.page_end) warp_arrive(&shared.q_empty);  // none of its pages is this consumer's
        for (; page < split.page_end; page += kConsumers)
            consume_page<T, kRows>(params, shared, tile, split, page, visible_to_all, consumer, state,
                                   softmax, own, others);
        state.pages += split.page_end - split.page_begin;
    }
    finish_split<T, kRows>(params, shared, tile, split, consumer, state.meeting_parity, softmax, own, others);
}

}  // namespace mla::few_rows

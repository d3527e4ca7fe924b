// The two consumer warpgroups. The first computes scores and softmax and multiplies the left half of V; the
// second receives the weights and multiplies the right half.
#pragma once

#include "epilogue.cuh"
#include "loader.cuh"
#include "wgmma.cuh"

namespace mla {

// Arrives once for each warp, after all of its lanes are done.
__device__ inline void warp_arrive(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
}

// scores (64 x 64) = q k^T, tile by tile as the page arrives.
template <typename T>
__device__ inline void compute_scores(SharedStorage& shared, const RingPosition<kStages>& stage,
                                      float (&scores)[32]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        const int tile = i == 0 ? kRopeTile : i - 1;
        ptx::barrier_wait(&shared.k_full[stage.slot][tile], stage.parity);
        wgmma::fence();
        const uint64_t q = wgmma::descriptor(shared.q[tile], 0);
        const uint64_t k = wgmma::descriptor(shared.k[stage.slot][tile], 0);
#pragma unroll
        for (int step = 0; step < 4; ++step)
            wgmma::Product<T>::scores(scores, wgmma::advance(q, step * 32), wgmma::advance(k, step * 32),
                                      i + step > 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(scores);
}

// Starts output (64 x 256) += weights (64 x 64) v; v is four tiles of the page, its rows are tokens.
template <typename T>
__device__ inline void start_output(const uint32_t (&weights)[16], const void* v_tiles,
                                    float (&output)[128]) {
    const uint64_t v = wgmma::descriptor(v_tiles, kTileBytes);
    wgmma::pin(output);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
        wgmma::Product<T>::output(output, &weights[4 * step], wgmma::advance(v, step * 16 * 128));
    wgmma::commit();
}

__device__ inline void finish_output(float (&output)[128]) {
    wgmma::wait<0>();
    wgmma::pin(output);
}

// Tokens past the end of the sequence may hold NaN, and 0 * NaN is NaN: their values become 0. Called by the
// warpgroup that multiplies these four tiles.
__device__ inline void zero_values_past_end(uint8_t (*tiles)[kTileBytes], int valid_tokens,
                                            NamedBarrier warpgroup) {
    constexpr int kChunksPerRow = 128 / 16;
    const int first = valid_tokens * kChunksPerRow;
    for (int chunk = first + threadIdx.x % kWarpgroup; chunk < 64 * kChunksPerRow; chunk += kWarpgroup)
        for (int tile = 0; tile < kTilesHalfV; ++tile)
            reinterpret_cast<uint4*>(tiles[tile])[chunk] = make_uint4(0, 0, 0, 0);
    ptx::fence_async_proxy();
    ptx::named_barrier_wait(warpgroup, kWarpgroup);
}

__device__ inline void rescale_output(float (&output)[128], float2 scale) {
    if (!__any_sync(~0u, scale.x != 1.f || scale.y != 1.f)) return;
#pragma unroll
    for (int i = 0; i < 128; ++i) output[i] *= i / 2 % 2 == 0 ? scale.x : scale.y;
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
__device__ inline void hand_over(SharedStorage& shared, int stage, const uint32_t (&weights)[16],
                                 float2 scale) {
    const int thread = threadIdx.x % kWarpgroup;
    auto* fragments = reinterpret_cast<uint4*>(shared.k[stage][kRopeTile]) + thread;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        fragments[i * kWarpgroup] =
            make_uint4(weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3]);
    shared.scale[stage][thread] = scale;
    ptx::barrier_arrive(&shared.weights_full[stage]);
}

__device__ inline float2 take_over(SharedStorage& shared, const RingPosition<kStages>& stage,
                                   uint32_t (&weights)[16]) {
    const int thread = threadIdx.x % kWarpgroup;
    ptx::barrier_wait(&shared.weights_full[stage.slot], stage.parity);
    const auto* fragments = reinterpret_cast<const uint4*>(shared.k[stage.slot][kRopeTile]) + thread;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 fragment = fragments[i * kWarpgroup];
        weights[4 * i] = fragment.x;
        weights[4 * i + 1] = fragment.y;
        weights[4 * i + 2] = fragment.z;
        weights[4 * i + 3] = fragment.w;
    }
    return shared.scale[stage.slot][thread];
}

// The same for the factors that end a split, in the stage of its last page.
__device__ inline void hand_over_normalizer(SharedStorage& shared, int stage, float2 normalizer) {
    shared.normalizer[stage][threadIdx.x % kWarpgroup] = normalizer;
    ptx::barrier_arrive(&shared.normalizer_full[stage]);
}

// `parities`: bit i is that of stage i, for not every page ends a split.
__device__ inline float2 take_over_normalizer(SharedStorage& shared, int stage, uint32_t& parities) {
    ptx::barrier_wait(&shared.normalizer_full[stage], parities >> stage & 1);
    parities ^= 1 << stage;
    return shared.normalizer[stage][threadIdx.x % kWarpgroup];
}

__device__ inline void clear(float (&output)[128]) {
#pragma unroll
    for (int i = 0; i < 128; ++i) output[i] = 0.f;
}

template <typename T>
__device__ inline void consume_scores_and_left(const DecodeParams& params, SharedStorage& shared, int part,
                                               const RowTile& tile) {
    float output[128], scores[32];
    uint32_t weights[16] = {};
    RingPosition<kStages> stage;
    RingPosition<1> q_round;
    for_each_split(params, part, [&](const Split& split) {
        OnlineSoftmax softmax(params.softmax_scale);
        if (split.is_empty()) {
            store_no_output<T>(params, tile, split, 0);
            store_lse(params, tile, split, softmax);
            return;
        }
        clear(output);
        int visible[2];
        for (int h = 0; h < 2; ++h)
            visible[h] =
                visible_keys(params, split.seq_len, tile.row(params, first_row_of_thread() + 8 * h).token);
        const int mask_from = keys_visible_to_all(params, split.seq_len);
        ptx::barrier_wait(&shared.q_full, q_round.parity);
        q_round.next();
        for (int page = split.page_begin; page < split.page_end; ++page) {
            const int first_key = page * kPageSize;
            const bool is_last = page + 1 == split.page_end;
            compute_scores<T>(shared, stage, scores);
            if (is_last) warp_arrive(&shared.q_empty);

            if (first_key + kPageSize > mask_from) mask_scores(scores, first_key, visible);
            const float2 scale = softmax.update(scores);
            pack_weights<T>(scores, weights);
            ptx::named_barrier_wait(kLeftWarpgroup, kWarpgroup);  // no warp's scores read the rope tile now
            hand_over(shared, stage.slot, weights, scale);

            rescale_output(output, scale);
            if (split.seq_len < first_key + kPageSize)
                zero_values_past_end(&shared.k[stage.slot][0], split.seq_len - first_key, kLeftWarpgroup);
            start_output<T>(weights, shared.k[stage.slot][0], output);
            finish_output(output);
            if (is_last) {
                softmax.finish();
                hand_over_normalizer(shared, stage.slot, softmax.normalizer());
                store_output<T>(params, tile, split, output, softmax.normalizer(), 0, shared.k[stage.slot][0],
                                kLeftWarpgroup);
                store_lse(params, tile, split, softmax);
            }
            warp_arrive(&shared.k_empty[stage.slot][kLeftV]);
            stage.next();
        }
    });
}

template <typename T>
__device__ inline void consume_right(const DecodeParams& params, SharedStorage& shared, int part,
                                     const RowTile& tile) {
    float output[128];
    uint32_t weights[16];
    RingPosition<kStages> stage;
    uint32_t normalizer_parities = 0;
    for_each_split(params, part, [&](const Split& split) {
        if (split.is_empty()) {
            store_no_output<T>(params, tile, split, kColumnsHalfV);
            return;
        }
        clear(output);
        for (int page = split.page_begin; page < split.page_end; ++page) {
            const int first_key = page * kPageSize;
            uint8_t (*v_tiles)[kTileBytes] = &shared.k[stage.slot][kTilesHalfV];
            const float2 scale = take_over(shared, stage, weights);
            rescale_output(output, scale);
            for (int t = kTilesHalfV; t < kTilesV; ++t)
                ptx::barrier_wait(&shared.k_full[stage.slot][t], stage.parity);
            if (split.seq_len < first_key + kPageSize)
                zero_values_past_end(v_tiles, split.seq_len - first_key, kRightWarpgroup);
            start_output<T>(weights, v_tiles, output);
            // The copy engine may overwrite the weights' place once they have been written and read for good:
            // the products have the registers, and the fence orders this thread's reads before the engine's
            // writes.
            ptx::fence_async_proxy();
            warp_arrive(&shared.k_empty[stage.slot][kRope]);
            finish_output(output);
            if (page + 1 == split.page_end) {
                const float2 normalizer = take_over_normalizer(shared, stage.slot, normalizer_parities);
                store_output<T>(params, tile, split, output, normalizer, kColumnsHalfV, *v_tiles,
                                kRightWarpgroup);
            }
            warp_arrive(&shared.k_empty[stage.slot][kRightV]);
            stage.next();
        }
    });
}

}  // namespace mla

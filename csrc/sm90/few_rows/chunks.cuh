// The batch-invariant mode where few query rows share a KV head: chunk by chunk. There is room for two
// outputs: a block that begins a sequence adds its chunks in registers.
#pragma once

#include "../chunks.cuh"
#include "consumers.cuh"

namespace mla::few_rows {

// The row that a thread adds up the weights of; the others get what they need of it from there.
template <int kRows>
__device__ inline int row_of_thread() {
    return threadIdx.x % kRows;
}

// A chunk's pages, the next ones of a piece.
template <typename T, int kRows>
__device__ inline WeightSum consume_chunk(const DecodeParams& params, Storage<kRows>& shared,
                                          const RowTile& tile, const Chunk& chunk, const Split& piece,
                                          int consumer, ConsumerState& state, HalfOutput<kRows>& output) {
    OnlineSoftmax<T, kRows> softmax(params.softmax_scale);
    clear<kRows>(output);
    Split rest = piece;
    rest.page_begin = chunk.page_begin;
    for (int page = chunk.page_begin; page < chunk.page_end; ++page)
        consume_page<T, kRows>(params, shared, tile, rest, page, consumer, state, softmax, output);
    softmax.publish(shared.sum[state.meeting_parity][consumer]);
    ptx::barrier_arrive(&shared.meeting);
    ptx::barrier_wait(&shared.meeting, state.meeting_parity);
    const WeightSum weights =
        total_of(shared, 1 - state.stage.slot, state.meeting_parity, row_of_thread<kRows>());
    state.meeting_parity ^= 1;
    return weights;
}

// A thread's value of each row, of those that it has values of.
template <int kRows>
__device__ inline void spread(float of_row, float (&of_value)[kRows / 4]) {
#pragma unroll
    for (int v = 0; v < kRows / 4; ++v) of_value[v] = __shfl_sync(~0u, of_row, row_of_value(v));
}

// Adds a chunk to the sum of those before it.
template <int kRows>
__device__ inline void add_chunk(const ChunkSum::Step& step, bool is_first, HalfOutput<kRows>& output,
                                 HalfOutput<kRows>& sum) {
    float take[kRows / 4];
    spread<kRows>(step.take, take);
    rescale_output<kRows>(output, take);
    if (!is_first && __any_sync(~0u, step.keep != 1.f)) {
        float keep[kRows / 4];
        spread<kRows>(step.keep, keep);
        rescale_output<kRows>(sum, keep);
    }
#pragma unroll
    for (int t = 0; t < kTilesHalfV; ++t)
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i)
            sum[t][i] = is_first ? output[t][i] : ptx::add_ftz(sum[t][i], output[t][i]);
}

// Stores a result for the merge, and its rows' weights.
template <int kRows>
__device__ inline void keep_chunks(const DecodeParams& params, const RowTile& tile, const Split& piece,
                                   const ChunkPartial& partial, const WeightSum& weights, int consumer,
                                   const HalfOutput<kRows>& output) {
    const uint64_t policy = ptx::evict_last();  // many pages will pass through the L2 before the merge
    for_each_value<kRows>(partial, piece.valid_rows(params, tile), consumer,
                          [&](float* at, int t, int i) { ptx::store(at, output[t][i], policy); });
    store_weight_sums<kRows>(params, weights, tile, piece, partial.weight_sums);
}

// A consumer's half of a piece of a sequence, chunk by chunk.
template <typename T, int kRows>
__device__ inline void consume_chunks(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                      const Split& piece, int consumer, ConsumerState& state) {
    const SplitPlace place(params, shared.plan, piece);
    const int first_slot = slot_of_chunks(params, shared.plan, place);
    const bool adds = adds_up(params, piece, first_slot);
    HalfOutput<kRows> output, sum;
    ChunkSum of_row;
    if (!piece.is_empty()) {
        ptx::barrier_wait(&shared.q_full, state.query_parity);
        state.query_parity ^= 1;
        if (piece.page_end - piece.page_begin == 1 && state.stage.slot != consumer)
            warp_arrive(&shared.q_empty);  // it scores none of the pages
    }
    for_each_chunk(params, piece, [&](const Chunk& chunk) {
        const WeightSum weights =
            consume_chunk<T, kRows>(params, shared, tile, chunk, piece, consumer, state, output);
        if (adds) {
            add_chunk<kRows>(of_row.next(weights), chunk.index == 0, output, sum);
        } else if (!chunk.is_empty()) {  // as a piece may be by a plan for other lengths
            keep_chunks<kRows>(params, tile, piece, ChunkPartial(params, first_slot, chunk.index), weights,
                               consumer, output);
        }
    });
    if (place.is_partial()) {
        if (adds)
            keep_chunks<kRows>(params, tile, piece, ChunkPartial(params, first_slot), of_row.weights,
                               consumer, sum);
        arrive(params, shared.plan, place, consumer);
    } else {
        float inverse[kRows / 4];
        spread<kRows>(of_row.weights.inverse(), inverse);
        rescale_output<kRows>(sum, inverse);
        store_weight_sums<kRows>(params, of_row.weights, tile, piece, nullptr);
        store_rows<T, kRows>(params, tile, piece, sum, consumer, shared.staging[consumer]);
    }
}

}  // namespace mla::few_rows

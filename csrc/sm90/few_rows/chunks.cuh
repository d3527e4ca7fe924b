// The batch-invariant mode where few query rows share a KV head: chunk by chunk. There is room for two
// outputs: a block that begins a sequence, or goes on with the sum of its chunks, adds in registers.
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

// Adds a chunk to the sum of those before it, or begins that with it.
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

// Calls `work` with the places of a sum that one thread leaves for its counterpart in another block, four
// values at a time as registers have them: where, in which tile, and the first one there.
template <int kRows, typename Work>
__device__ inline void for_each_four(const ChunkPartial& partial, int rows, int consumer, Work&& work) {
#pragma unroll
    for (int octet = 0; octet < kRows / kOctetRows; ++octet) {
        if (octet * kOctetRows >= rows) break;
        auto* at = reinterpret_cast<float4*>(partial.group(octet, consumer * kGroups / 2)) +
                   threadIdx.x % kWarpgroup;
#pragma unroll
        for (int t = 0; t < kTilesHalfV; ++t) work(at + t * kWarpgroup, t, 4 * octet);
    }
}

// Stores a sum of chunks, or a chunk: for the merge, or for the next part to go on with.
template <int kRows>
__device__ inline void keep_sum(const ChunkPartial& partial, int rows, bool is_handed_over, int consumer,
                                const HalfOutput<kRows>& sum) {
    const uint64_t policy = ptx::evict_last();  // many pages will pass through the L2 before it is read
    if (is_handed_over) {
        for_each_four<kRows>(partial, rows, consumer, [&](float4* at, int t, int i) {
            ptx::store(at, make_float4(sum[t][i], sum[t][i + 1], sum[t][i + 2], sum[t][i + 3]), policy);
        });
    } else {
        for_each_value<kRows>(partial, rows, consumer,
                              [&](float* at, int t, int i) { ptx::store(at, sum[t][i], policy); });
    }
}

// The sum of the chunks before, which the part before has handed over; returns the weights of the thread's
// row.
template <int kRows>
__device__ inline WeightSum take_over_sum(const DecodeParams& params, Storage<kRows>& shared,
                                          const RowTile& tile, const Split& piece, const PiecePlace& place,
                                          int slot, int consumer, HalfOutput<kRows>& sum) {
    wait_for_sum(params, shared.plan, shared.phases, piece, place, consumer);
    const ChunkPartial partial(params, slot);
    const int rows = piece.valid_rows(params, tile), row = row_of_thread<kRows>();
    const uint64_t read_once = ptx::evict_first();
    for_each_four<kRows>(partial, rows, consumer, [&](const float4* at, int t, int i) {
        const float4 values = ptx::load(at, read_once);
        sum[t][i] = values.x;
        sum[t][i + 1] = values.y;
        sum[t][i + 2] = values.z;
        sum[t][i + 3] = values.w;
    });
    return row < rows ? WeightSum(__ldcg(partial.weight_sums + row)) : WeightSum(0.f, 1.f);
}

// A consumer's half of a piece of a sequence, chunk by chunk.
template <typename T, int kRows>
__device__ inline void consume_chunks(const DecodeParams& params, Storage<kRows>& shared, const RowTile& tile,
                                      const Split& piece, int consumer, ConsumerState& state) {
    const PiecePlace place(params, shared.plan, piece);
    const int first_slot = slot_of_chunks(params, shared.plan, place);
    const bool adds = place.goes_on() || adds_up(params, piece, first_slot);
    HalfOutput<kRows> output, sum;
    ChunkSum of_row;
    if (place.goes_on())
        of_row.weights = take_over_sum<kRows>(params, shared, tile, piece, place, first_slot, consumer, sum);
    if (!piece.is_empty()) {
        ptx::barrier_wait(&shared.q_full, state.query_parity);
        state.query_parity ^= 1;
        if (piece.page_end - piece.page_begin == 1 && state.stage.slot != consumer)
            warp_arrive(&shared.q_empty);  // it scores none of the pages
    }
    for_each_chunk(params, piece, [&](const Chunk& chunk) {
        const WeightSum weights =
            consume_chunk<T, kRows>(params, shared, tile, chunk, piece, consumer, state, output);
        if (!adds) of_row = {};
        add_chunk<kRows>(of_row.next(weights), !adds || chunk.index == 0, output, sum);
        const bool is_kept = adds ? place.is_partial() && !place.goes_on() && chunk.ends_piece
                                  : !chunk.is_empty();  // as a piece may be by a plan for other lengths
        if (!is_kept) return;
        const ChunkPartial partial(params, first_slot, adds ? 0 : chunk.index);
        store_weight_sums<kRows>(params, of_row.weights, tile, piece, partial.weight_sums);
        keep_sum<kRows>(partial, piece.valid_rows(params, tile), adds && place.is_handed_over, consumer, sum);
    });
    if (place.is_partial() && !place.goes_on()) {
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

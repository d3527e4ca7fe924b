// The batch-invariant mode where many query rows share a KV head: chunk by chunk. A block that begins a
// sequence adds its chunks in the L2, where there is room for a second output; but the sequence's last one it
// has in registers, and the sum comes there.
#pragma once

#include "../chunks.cuh"
#include "consumers.cuh"

namespace mla::many_rows {

// Stores a chunk, or adds it to the sum of those before it, which this thread has stored. Many pages will
// pass through the L2 before that is read.
__device__ inline void keep_chunk(const DecodeParams& params, const RowTile& tile, const Chunk& chunk,
                                  int slot, bool adds, int consumer, const float (&output)[128]) {
    const uint64_t policy = ptx::evict_last();
    for_each_pair(ChunkPartial(params, slot), chunk.valid_rows(params, tile), consumer,
                  [&](int, float2* to, int i) {
                      ptx::add_or_store(to, make_float2(output[i], output[i + 1]), adds, policy);
                  });
}

// Adds the sum of the chunks before, which this thread has stored, to a chunk's `output`.
__device__ inline void add_earlier_chunks(const DecodeParams& params, const RowTile& tile, const Chunk& chunk,
                                          int slot, const ChunkSum::Step (&steps)[2], int consumer,
                                          float (&output)[128]) {
    const uint64_t read_once = ptx::evict_first();
    for_each_pair(ChunkPartial(params, slot), chunk.valid_rows(params, tile), consumer,
                  [&](int h, const float2* at, int i) {
                      const float2 earlier = ptx::load(at, read_once);
                      output[i] = steps[h].add(earlier.x, output[i]);
                      output[i + 1] = steps[h].add(earlier.y, output[i + 1]);
                  });
}

// A chunk's result to memory: as it is, or added up in a piece that begins its sequence; or if that is all of
// it, the sequence's.
template <typename T>
__device__ inline void finish_chunk(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                    const Chunk& chunk, int first_slot, bool adds_up, const SplitEnd& end,
                                    int consumer, const ConsumerState& state, float (&output)[128]) {
    if (chunk.is_empty()) {
        if (chunk.seq_len > 0) return;  // a piece in which no chunk begins: only a plan for other lengths
        if (consumer == kLeft) store_weight_sums(params, tile, chunk, end, nullptr);
        store_zeros<T>(params, tile, chunk, consumer);
        return;
    }
    const int slot = first_slot + (adds_up ? 0 : chunk.index);
    ChunkSum(&sums)[2] = shared.sums[consumer][threadIdx.x % kWarpgroup];
    ChunkSum::Step steps[2];
    if (adds_up) {
        if (chunk.index == 0) sums[0] = sums[1] = {};
        const int rows_left = chunk.valid_rows(params, tile) - first_row_of_thread();
        SplitEnd counted = end;
        if (rows_left <= 0) counted.rows[0] = {0.f, 1.f};  // padding never outweighs what was before
        if (rows_left <= 8) counted.rows[1] = {0.f, 1.f};
        steps[0] = sums[0].next(counted.rows[0]);
        steps[1] = sums[1].next(counted.rows[1]);
    }
    const bool is_final = chunk.ends_piece && is_slot_of_part(params, first_slot);
    if (consumer == kLeft && (chunk.ends_piece || !adds_up)) {
        SplitEnd weights = end;
        if (adds_up) weights = {{sums[0].weights, sums[1].weights}};
        store_weight_sums(params, tile, chunk, weights,
                          is_final ? nullptr : ChunkPartial(params, slot).weight_sums);
    }
    const bool is_alone = !adds_up || chunk.index == 0;  // nothing is there to be added to
    const bool is_plain = !__any_sync(~0u, steps[0].keep != 1.f || steps[1].keep != 1.f);
    const bool adds = !is_alone && !is_final && is_plain;  // in the L2; else the sum comes here
    const bool takes_sum = !is_alone && !adds;
#pragma unroll 1
    for (int i = 0; i < (is_final ? 2 : 1); ++i) {  // a loop, for the code of a scaling is long
        float2 scale = make_float2(steps[0].take, steps[1].take);
        if (i == 1) scale = make_float2(sums[0].weights.inverse(), sums[1].weights.inverse());
        rescale_output(output, scale);
        if (i == 0 && takes_sum) add_earlier_chunks(params, tile, chunk, slot, steps, consumer, output);
    }
    if (is_final) {
        store_rows<T>(params, tile, chunk, output, consumer,
                      shared.k[state.stage.slot][consumer * kTilesHalfV]);
    } else {
        keep_chunk(params, tile, chunk, slot, adds, consumer, output);
    }
}

// A consumer's half of a piece of a sequence, chunk by chunk.
template <typename T>
__device__ inline void consume_chunks(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                      const Split& piece, int consumer, ConsumerState& state) {
    const int first_slot =
        ptx::uniform(slot_of_chunks(params, shared.plan, SplitPlace(params, shared.plan, piece)));
    const bool adds = adds_up(params, piece, first_slot);
    for_each_chunk(params, piece, [&](const Chunk& chunk) {
        float output[128];  // the first page's product overwrites it; of an empty chunk nobody reads it
        const SplitEnd end = consumer == kLeft ? consume_scores_and_left<T>(params, shared, tile, chunk,
                                                                            chunk.ends_piece, state, output)
                                               : consume_right<T>(params, shared, chunk, state, output);
        finish_chunk<T>(params, shared, tile, chunk, first_slot, adds, end, consumer, state, output);
        if (!chunk.is_empty()) give_back_page(shared, consumer, state);
    });
    // The place is worked out again: registers are short while there are chunks.
    if (!is_slot_of_part(params, first_slot))
        arrive(params, shared.plan, SplitPlace(params, shared.plan, piece), consumer);
}

}  // namespace mla::many_rows

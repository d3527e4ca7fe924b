// The batch-invariant mode where many query rows share a KV head: chunk by chunk. A block that begins a
// sequence adds its chunks in the L2, where there is room for a second output, and what registers have room
// for there; but the sequence's last one it has in registers, and all of the sum comes there.
#pragma once

#include "../chunks.cuh"
#include "consumers.cuh"

namespace mla::many_rows {

// Of a sum, so many of a thread's values, the last ones, stay in registers beside output and scores.
constexpr int kKeptValues = 52;
constexpr int kFirstKept = 128 - kKeptValues;
static_assert(kKeptValues % 4 == 0);  // of a thread's two rows two columns each
using KeptSum = float[kKeptValues];

// Adds a chunk's share of these to the sum of the chunks before, and leaves that in `output`, too.
__device__ inline void add_kept(const ChunkSum::Step (&steps)[2], bool is_first, float (&output)[128],
                                KeptSum& kept) {
#pragma unroll
    for (int i = 0; i < kKeptValues; ++i) {
        float& value = output[kFirstKept + i];
        if (!is_first) value = steps[i / 2 % 2].add(kept[i], value);
        kept[i] = value;
    }
}

// Stores a chunk, or adds it to the sum of those before it, which this thread has stored, or took over from
// its counterpart; what of the sum is in registers is stored at the piece's end. Many pages will pass through
// the L2 before that is read.
__device__ inline void keep_chunk(const DecodeParams& params, const RowTile& tile, const Chunk& chunk,
                                  int slot, bool adds, bool stores_kept, int consumer,
                                  const float (&output)[128]) {
    const uint64_t policy = ptx::evict_last();
    for_each_pair(ChunkPartial(params, slot), chunk.valid_rows(params, tile), consumer,
                  [&](int, float2* to, int i) {
                      const float2 value = make_float2(output[i], output[i + 1]);
                      if (i < kFirstKept) {
                          ptx::add_or_store(to, value, adds, policy);
                      } else if (stores_kept) {
                          ptx::store(to, value, policy);
                      }
                  });
}

// Adds what is stored of the sum of the chunks before to a chunk's `output`; what is kept has been added. All
// that comes is under way together: `kept` lends its registers, and gets from the output what it had. Loads
// are not conditional, else the compiler spills: in padding rows it adds whatever lies there, which nobody
// stores.
__device__ inline void add_stored_sum(const DecodeParams& params, int slot, const ChunkSum::Step (&steps)[2],
                                      int consumer, float (&output)[128], KeptSum& kept) {
    constexpr int kPairs = kFirstKept / 4;                   // that are stored of each of a thread's rows
    constexpr int kAtOnce = kKeptValues / 2;                 // pairs that `kept` has room for
    constexpr int kToNext = ChunkPartial::kGroupFloats / 2;  // from a row's pair to its next one
    const uint64_t read_once = ptx::evict_first();
    // Octets past the slot's end, all of padding, are the first one again.
    const int octets = params.partial_rows / kOctetRows, octet = threadIdx.x % kWarpgroup / 32 * 2;
    const ChunkPartial sum(params, slot);
    const auto* at =
        reinterpret_cast<const float2*>(sum.group(octet < octets ? octet : 0, consumer * kGroups / 2)) +
        threadIdx.x % 32;
    const int to_second = octet + 1 < octets ? kGroups * kToNext : 0;
#pragma unroll
    for (int begin = 0; begin < 2 * kPairs; begin += kAtOnce) {
        const int end = min(begin + kAtOnce, 2 * kPairs);
#pragma unroll
        for (int n = begin; n < end; ++n) {
            const float2 value = ptx::load(at + n / kPairs * to_second + n % kPairs * kToNext, read_once);
            kept[2 * (n - begin)] = value.x;
            kept[2 * (n - begin) + 1] = value.y;
        }
#pragma unroll
        for (int n = begin; n < end; ++n) {
            const int h = n / kPairs, i = 4 * (n % kPairs) + 2 * h;
            output[i] = steps[h].add(kept[2 * (n - begin)], output[i]);
            output[i + 1] = steps[h].add(kept[2 * (n - begin) + 1], output[i + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < kKeptValues; ++i) kept[i] = output[kFirstKept + i];
}

// The sum of the chunks before, which the part before has stored.
__device__ inline void take_over_sum(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                     const Split& piece, const PiecePlace& place, int slot, int consumer,
                                     KeptSum& kept) {
    wait_for_sum(params, shared.plan, shared.phases, piece, place, consumer);
    const ChunkPartial sum(params, slot);
    const int rows = piece.valid_rows(params, tile);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = first_row_of_thread() + 8 * h;
        shared.sums[consumer][threadIdx.x % kWarpgroup][h].weights =
            row < rows ? WeightSum(__ldcg(sum.weight_sums + row)) : WeightSum(0.f, 1.f);
    }
    const uint64_t read_once = ptx::evict_first();
    for_each_pair(sum, rows, consumer, [&](int, const float2* at, int i) {
        if (i < kFirstKept) return;
        const float2 value = ptx::load(at, read_once);
        kept[i - kFirstKept] = value.x;
        kept[i + 1 - kFirstKept] = value.y;
    });
}

// A chunk's result to memory: as it is, or added up; or the sequence's, if with the last one of a piece
// `all_added` are its chunks.
template <typename T>
__device__ inline void finish_chunk(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                    const Chunk& chunk, int first_slot, bool adds_up, bool all_added,
                                    const SplitEnd& end, int consumer, const ConsumerState& state,
                                    float (&output)[128], KeptSum& kept) {
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
    const bool is_final = chunk.ends_piece && all_added;
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
        if (i == 0 && adds_up) add_kept(steps, chunk.index == 0, output, kept);
        if (i == 0 && takes_sum) add_stored_sum(params, slot, steps, consumer, output, kept);
    }
    if (is_final) {
        store_rows<T>(params, tile, chunk, output, consumer,
                      shared.k[state.stage.slot][consumer * kTilesHalfV]);
    } else {
        keep_chunk(params, tile, chunk, slot, adds, chunk.ends_piece || !adds_up, consumer, output);
    }
}

// A consumer's half of a piece of a sequence, chunk by chunk.
template <typename T>
__device__ inline void consume_chunks(const DecodeParams& params, Storage& shared, const RowTile& tile,
                                      const Split& piece, int consumer, ConsumerState& state) {
    const PiecePlace place(params, shared.plan, piece);
    const int first_slot = ptx::uniform(slot_of_chunks(params, shared.plan, place));
    const bool goes_on = ptx::uniform(place.goes_on());
    const bool adds = goes_on || adds_up(params, piece, first_slot);
    const bool all_added = goes_on || is_slot_of_part(params, first_slot);
    KeptSum kept;
    if (goes_on) take_over_sum(params, shared, tile, piece, place, first_slot, consumer, kept);
    for_each_chunk(params, piece, [&](const Chunk& chunk) {
        float output[128];  // the first page's product overwrites it; of an empty chunk nobody reads it
        const SplitEnd end = consumer == kLeft ? consume_scores_and_left<T>(params, shared, tile, chunk,
                                                                            chunk.ends_piece, state, output)
                                               : consume_right<T>(params, shared, chunk, state, output);
        finish_chunk<T>(params, shared, tile, chunk, first_slot, adds, all_added, end, consumer, state,
                        output, kept);
        if (!chunk.is_empty()) give_back_page(shared, consumer, state);
    });
    // The place is worked out again: registers are short while there are chunks.
    if (!all_added) arrive(params, shared.plan, PiecePlace(params, shared.plan, piece), consumer);
}

}  // namespace mla::many_rows

// The batch-invariant mode: a part's pieces of sequences in chunks, and the merge of these, always in the
// same order and by the same operations, so that the result's bits do not depend on who works on which of
// them.
//
// A block that begins a sequence adds its chunks up, and if it has all of them the result is there. Of two
// blocks the second may go on with the first one's sum: it is what the first begins with, and what the second
// ends with. Else other blocks store their chunks apart, and all of a sequence's blocks merge their shares.
// All add in the sequence's order.
#pragma once

#include <cmath>

#include "arrivals.cuh"
#include "numbers.cuh"
#include "partial.cuh"
#include "rows.cuh"

namespace mla {

// A chunk of a part's piece of a sequence; one without pages has one that is empty.
struct Chunk : Split {
    int index;  // within the sequence
    bool ends_piece;
};

// Calls `work` on each chunk of a piece.
template <typename Work>
__device__ inline void for_each_chunk(const DecodeParams& params, const Split& piece, Work&& work) {
    const int log2 = chunk_log2(pages_of(piece.seq_len), params.chunk_level);
    Chunk chunk{piece, 0, true};
    do {
        chunk.index = chunk.page_begin >> log2;
        chunk.page_end = min(piece.page_end, (chunk.index + 1) << log2);
        chunk.ends_piece = chunk.page_end == piece.page_end;
        work(chunk);
        chunk.page_begin = chunk.page_end;
    } while (chunk.page_begin < piece.page_end);
}

// What a piece is of its sequence.
struct PiecePlace : SplitPlace {
    bool is_handed_over;  // of two pieces the second goes on with the first one's sum

    __device__ PiecePlace(const DecodeParams& params, const BlockPlan& plan, const Split& piece)
        : SplitPlace(params, plan, piece),
          is_handed_over((piece.seq == plan.first_seq ? plan.first_splits : plan.last_splits) < 0 &&
                         is_partial()) {}
    __device__ bool goes_on() const { return is_handed_over && index > 0; }
};

// Waits for the sum that a piece goes on with. The piece arrives, too, though it has written nothing: only
// when all have, the counter is as it was.
__device__ inline void wait_for_sum(const DecodeParams& params, const BlockPlan& plan, const Phases& phases,
                                    const Split& piece, const PiecePlace& place, int consumer) {
    arrive(params, plan, place, consumer);
    wait_for_all(params, plan, phases, piece, place, consumer);
}

// The slot of a piece's chunk 0, and of the sum of its chunks if it begins the sequence. Each part has one
// for sequences that it has all of, one after the other, which so stays in the L2; behind these lie those of
// the sequences that are cut.
__device__ inline int slot_of_chunks(const DecodeParams& params, const BlockPlan& plan,
                                     const SplitPlace& place) {
    if (!place.is_partial()) return plan.part;
    const int cut_before = place.first_slot + place.index - plan.part;  // a split's slot is part + these
    return params.num_parts +
           max(0, min(cut_before, min(params.batch, params.num_parts - 1) - 1)) * params.chunks_per_seq;
}

// Whether it is that of a part, for sequences that it has all of.
__device__ inline bool is_slot_of_part(const DecodeParams& params, int slot) {
    return slot < params.num_parts;
}

// Whether a piece's chunks are added up: it begins its sequence. By a plan for other lengths one that is all
// of it may not; it has no slots for its chunks.
__device__ inline bool adds_up(const DecodeParams& params, const Split& piece, int first_slot) {
    return piece.page_begin == 0 || is_slot_of_part(params, first_slot);
}

// A row's chunks so far: their results, which their weights have not divided, add up as these do.
struct ChunkSum {
    WeightSum weights;  // of all

    // What the next chunk does to the sum.
    struct Step {
        float keep = 1.f;  // by what to scale it, 1 but where a chunk outweighs those before by 2^kSlack
        float take = 1.f;  // by what to scale the chunk

        // The sum with a chunk that is scaled already. As the L2 adds, which takes subnormal numbers for 0.
        __device__ float add(float sum, float taken) const {
            return ptx::add_ftz(__fmul_rn(sum, keep), taken);
        }
    };
    __device__ Step next(const WeightSum& chunk) {
        Step step;
        if (chunk.max > weights.max + kSlack) {
            step.keep = ptx::exp2_approx(weights.max - chunk.max);  // 0 at the first chunk: that is -inf
            weights.max = chunk.max;
        }
        step.take = chunk.max == -INFINITY ? 0.f : ptx::exp2_approx(chunk.max - weights.max);
        weights.sum = __fadd_rn(__fmul_rn(weights.sum, step.keep), __fmul_rn(chunk.sum, step.take));
        return step;
    }
};

// Lane 2 r + i of a half-warp has columns 4 i to 4 i + 3 of row r of an octet, in kVectors groups of columns,
// each second one; kLoads of these vectors are under way together. Merged are `count` results: the first,
// that of all chunks before chunk `second`, and those from there on: two or more, so their sum has no
// subnormal numbers, and results past the last one do not change it. Branches between results, in place of
// these, would have each wait for the exponentials of the one before.
template <typename T, int kLoads, int kVectors>
__device__ inline void merge_item(const DecodeParams& params, const RowTile& tile, const Split& piece,
                                  const ChunkPartial& first, int second, int count, int octet, int group) {
    static_assert(kLoads % kVectors == 0);
    constexpr int kUnroll = kLoads / kVectors;  // chunks at a time
    const uint64_t read_once = ptx::evict_first();
    const int lane = threadIdx.x % 16, to_next = ChunkPartial::rows_to_next(params);
    const float2* weights_at = first.weight_sums + octet * kOctetRows + lane / 2;
    const float* at = first.group(octet, group) + lane / 2 * kGroupColumns + lane % 2 * 4;
    ChunkSum row_sum;
    float4 sum[kVectors] = {};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kUnroll) {
        float4 value[kUnroll][kVectors];
        WeightSum weights[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const bool is_there = begin + i < count;
            weights[i] = is_there ? WeightSum(__ldcg(weights_at)) : WeightSum();
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const auto* vector = reinterpret_cast<const float4*>(at + 2 * v * ChunkPartial::kGroupFloats);
                value[i][v] = make_float4(-0.f, -0.f, -0.f, -0.f);  // adding it keeps a zero's sign
                if (is_there) value[i][v] = ptx::load(vector, read_once);
            }
            const int rows = begin + i == 0 ? second * to_next : to_next;
            weights_at += rows;
            at += rows * static_cast<int64_t>(kHeadDimV);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const auto step = row_sum.next(weights[i]);
            const auto add = [&](float to, float chunk) {
                const float taken = __fmul_rn(chunk, step.take);
                // the first is stored, not added: its subnormal numbers stay
                return begin + i == 0 ? taken : step.add(to, taken);
            };
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                sum[v] = make_float4(add(sum[v].x, value[i][v].x), add(sum[v].y, value[i][v].y),
                                     add(sum[v].z, value[i][v].z), add(sum[v].w, value[i][v].w));
        }
    }
    store_merged<T>(params, tile, piece, octet, group, sum, row_sum.weights);
}

// A warp's items of a merge: 8 rows x 16 kVectors columns each. See merge_item.
template <typename T, int kLoads, int kVectors>
__device__ inline void merge_items(const DecodeParams& params, const RowTile& tile, const Split& piece,
                                   const SplitPlace& part, const ChunkPartial& first, int second, int count,
                                   int octets, int consumer) {
    constexpr int kItems = kGroups / (2 * kVectors);  // in an octet
    const int warp = threadIdx.x % kWarpgroup / 32, half = threadIdx.x % 32 / 16;
    const int ranks = part.num_splits * kConsumers, rank = part.index * kConsumers + consumer;
#pragma unroll 1
    for (int item = rank + warp * ranks; item < octets * kItems; item += kWarps * ranks)
        merge_item<T, kLoads, kVectors>(params, tile, piece, first, second, count, item / kItems,
                                        item % kItems * 2 * kVectors + half);
}

// Merges the part's share of the sequences whose chunks others have stored, too: kMost vectors of columns a
// lane at a time, or kLeast where warps would have nothing to do. kLoads: see merge_item.
template <typename T, int kLoads, int kMost, int kLeast>
__device__ inline void merge_chunks(const DecodeParams& params, const BlockPlan& plan, const Phases& phases,
                                    const RowTile& tile, int consumer) {
    for_each_split<kForwards>(params, plan, tile, [&](const Split& piece) {
        const PiecePlace part(params, plan, piece);
        if (!part.is_partial() || part.is_handed_over) return;
        const int pages = pages_of(piece.seq_len), chunks = num_chunks(pages, params.chunk_level);
        const int second_page = params.parts[plan.part - part.index + 1].first_page;
        const int second = max(1, min(second_page >> chunk_log2(pages, params.chunk_level), chunks));
        const ChunkPartial first(params, slot_of_chunks(params, plan, part));
        wait_for_all(params, plan, phases, piece, part, consumer);
        const int count = 1 + chunks - second;
        const int octets = (piece.valid_rows(params, tile) + kOctetRows - 1) / kOctetRows;
        const int warps = part.num_splits * kConsumers * kWarps;
        constexpr int kItems = kGroups / (2 * kMost);
        if (kLeast == kMost || 2 * octets * kItems > warps) {
            merge_items<T, kLoads, kMost>(params, tile, piece, part, first, second, count, octets, consumer);
        } else {
            merge_items<T, kLoads, kLeast>(params, tile, piece, part, first, second, count, octets, consumer);
        }
    });
}

}  // namespace mla

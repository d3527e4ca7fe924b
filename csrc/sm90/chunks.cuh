// The batch-invariant mode: a part's pieces of sequences in chunks, and the merge of these, always in the
// same order and by the same operations, so that the result's bits do not depend on who works on which of
// them.
//
// A block that has all of a sequence adds its chunks in the L2, all but the last one, which it has in
// registers; others store theirs apart, and merge their shares. Both add in the sequence's order.
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

    __device__ bool ends_sequence() const { return page_end == pages_of(seq_len); }
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

// The slot of a chunk that has pages: one of its sequence's, or with others of it in one.
__device__ inline int slot_of_chunk(const DecodeParams& params, const BlockPlan& plan, const Chunk& chunk,
                                    bool is_all_here) {
    if (!is_all_here) return chunk.seq * params.chunks_per_seq + chunk.index;
    // A part that has all of a sequence needs its chunks no longer than it works on it: such sequences of a
    // part share the place of the first of them, which so stays in the L2.
    const int first_here = max(plan.first_seq + (plan.first_splits > 1), 0);
    return min(first_here, chunk.seq) * params.chunks_per_seq;
}

// A row's chunks so far: their results, each times its share of the weights, add up.
struct ChunkSum {
    WeightSum weights;  // a chunk counts as one

    // What the next chunk does to the sum.
    struct Step {
        float keep = 1.f;  // by what to scale it, 1 but where a chunk outweighs those before by 2^kSlack
        float take = 1.f;  // by what to scale the chunk, whose own weights have not divided it yet

        // The sum with a chunk that is scaled already. As the L2 adds, which takes subnormal numbers for 0.
        __device__ float add(float sum, float taken) const {
            return ptx::add_ftz(__fmul_rn(sum, keep), taken);
        }
    };
    __device__ Step next(const WeightSum& chunk) {
        Step step;
        const float log2 = chunk.log2();
        if (log2 > weights.max + kSlack) {
            step.keep = ptx::exp2_approx(weights.max - log2);  // 0 at the first chunk: that is -inf
            weights.max = log2;
        }
        const float weight = log2 == -INFINITY ? 0.f : ptx::exp2_approx(log2 - weights.max);
        weights.sum = __fadd_rn(__fmul_rn(weights.sum, step.keep), weight);
        step.take = __fmul_rn(weight, chunk.inverse());
        return step;
    }
};

// Lane 2 r + i of a half-warp has columns 4 i to 4 i + 3 of row r of an octet, in kVectors groups of columns,
// each second one.
template <typename T, int kVectors>
__device__ inline void merge_item(const DecodeParams& params, const RowTile& tile, const Split& piece,
                                  const SplitPlace& place, int octet, int group) {
    constexpr int kUnroll = 2;  // chunks whose loads are under way together
    const Partial first(params, tile, place.first_slot);
    const int chunks = place.num_splits;
    const uint64_t read_once = ptx::evict_first();
    const int lane = threadIdx.x % 16;
    const int row_of_octet = min(lane / 2, first.octet_rows(octet) - 1);  // past a cut octet's end the last
    const int vector_stride = 2 * first.group_stride(octet);
    const float2* weights_row = first.weight_sums + octet * kOctetRows + row_of_octet;
    const float* out = first.group(octet, group) + row_of_octet * kGroupColumns + lane % 2 * 4;
    ChunkSum row_sum;
    float4 sum[kVectors] = {};
#pragma unroll 1
    for (int begin = 0; begin < chunks; begin += kUnroll) {
        float4 value[kUnroll][kVectors];
        WeightSum weights[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            if (begin + i >= chunks) break;
            weights[i] = WeightSum(__ldcg(weights_row + (begin + i) * params.partial_rows));
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                value[i][v] =
                    ptx::load(reinterpret_cast<const float4*>(
                                  out + (begin + i) * static_cast<int64_t>(params.partial_rows) * kHeadDimV +
                                  v * vector_stride),
                              read_once);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            if (begin + i >= chunks) break;
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

// Merges the part's share of the sequences that others work on, too.
template <typename T>
__device__ inline void merge_chunks(const DecodeParams& params, const BlockPlan& plan, const Phases& phases,
                                    const RowTile& tile, int consumer) {
    constexpr int kVectors = 4, kItems = kGroups / (2 * kVectors);  // a warp's work in an octet
    const int warp = threadIdx.x % kWarpgroup / 32, half = threadIdx.x % 32 / 16;
    for_each_split(params, plan, tile, [&](const Split& piece) {
        const SplitPlace part(params, plan, piece);
        if (!part.is_partial()) return;
        const int chunks = num_chunks(pages_of(piece.seq_len), params.chunk_level);
        const SplitPlace place(0, chunks, piece.seq * params.chunks_per_seq);
        wait_for_all(params, plan, phases, piece, part, consumer);
        const int ranks = part.num_splits * kConsumers, rank = part.index * kConsumers + consumer;
        const int items = (piece.valid_rows(params, tile) + kOctetRows - 1) / kOctetRows * kItems;
#pragma unroll 1
        for (int item = rank + warp * ranks; item < items; item += 4 * ranks)
            merge_item<T, kVectors>(params, tile, piece, place, item / kItems,
                                    item % kItems * 2 * kVectors + half);
    });
}

}  // namespace mla

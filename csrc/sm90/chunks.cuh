// The batch-invariant mode: a part's pieces of sequences in chunks, and the merge of these, always in the
// same order and by the same operations, so that the result's bits do not depend on who works on which of
// them.
//
// The order is the last chunk, then the first, the second, ... A block that has all of a sequence adds the
// others to the last one, which it has in registers; others merge their shares from memory.
#pragma once

#include <cmath>

#include "arrivals.cuh"
#include "numbers.cuh"
#include "partial.cuh"
#include "rows.cuh"

namespace mla {

// A chunk of a part's piece of a sequence.
struct Chunk : Split {
    bool ends_piece;
    bool is_all_here;  // the part has all of the sequence
    SplitPlace place;  // among the sequence's chunks; one without pages is the first

    // Whether it is of a piece in which no chunk begins, which only a plan for other lengths has.
    __device__ bool is_idle() const { return is_empty() && seq_len > 0; }
    // Whether the block has worked on all of a sequence after this chunk.
    __device__ bool completes_sequence() const { return is_all_here && place.index == place.num_splits - 1; }
};

// The place of a sequence's first chunk, if its partials are kept where those of sequence `kept_at` would be.
__device__ inline SplitPlace first_chunk_of(const DecodeParams& params, const Split& piece, int kept_at) {
    const int pages = pages_of(piece.seq_len), log2 = chunk_log2(pages, params.chunk_level);
    return {0, (pages + (1 << log2) - 1) >> log2, kept_at * params.chunks_per_seq};
}

// Calls `work` on each chunk of a piece; on one that is empty, if the piece has no page.
template <typename Work>
__device__ inline void for_each_chunk(const DecodeParams& params, const PartPlan& plan, const Split& piece,
                                      Work&& work) {
    const bool is_all_here = !SplitPlace(params, plan, piece).is_partial();
    // A part that has all of a sequence needs its chunks no longer than it works on it: such sequences of a
    // part share the place of the first of them, which so stays in the L2. A consumer may still read the
    // log-sum-exps of one when the other stores the next one's: not before that one's second page, the place
    // of which in shared memory was free only after the reading.
    static_assert(kStages <= 2 && chunk_log2(2, 1) >= 1, "chunks that others follow have kStages pages");
    const int first_here = max(plan.first_seq + (plan.first_splits > 1), 0);
    const int kept_at = is_all_here ? min(first_here, piece.seq) : piece.seq;  // more: in a foreign plan
    const int log2 = chunk_log2(pages_of(piece.seq_len), params.chunk_level);
    Chunk chunk{piece, true, is_all_here, first_chunk_of(params, piece, kept_at)};
    do {
        chunk.place.index = chunk.page_begin >> log2;
        chunk.page_end = min(piece.page_end, (chunk.place.index + 1) << log2);
        chunk.ends_piece = chunk.page_end == piece.page_end;
        work(chunk);
        chunk.page_begin = chunk.page_end;
    } while (chunk.page_begin < piece.page_end);
}

// A row's chunks so far: their sum counts relative to exp(max), and weighs `weight`. One in which the row saw
// no key counts nothing, unless its values are no numbers: so it is within a chunk, too.
struct ChunkSum {
    float max = -INFINITY;
    float weight = 0.f;

    // By what the sum and the next chunk's normalized result count.
    struct Factors {
        float keep, take;
        __device__ float operator()(float sum, float value) const {
            return __fmaf_rn(value, take, __fmul_rn(sum, keep));
        }
    };
    __device__ Factors add(float lse) {
        const float before = max;
        max = fmaxf(max, lse);
        const float offset = max == -INFINITY ? 0.f : max;  // neither saw a key: both count 0, not NaN
        const Factors factors{ptx::exp2_approx((before - offset) * kLog2E),
                              ptx::exp2_approx((lse - offset) * kLog2E)};
        weight = factors(weight, 1.f);
        return factors;
    }
    __device__ float inverse() const { return weight == 0.f ? 0.f : ptx::reciprocal_approx(weight); }
    __device__ float lse() const { return weight == 0.f ? INFINITY : max + __logf(weight); }
};

// Lane 2 r + i of a half-warp has columns 4 i to 4 i + 3 of row r of an octet, in kVectors groups of columns,
// each second one.
template <typename T, int kVectors>
__device__ inline void merge_item(const DecodeParams& params, const RowTile& tile, const Split& piece,
                                  const SplitPlace& place, int octet, int group) {
    constexpr int kUnroll = 2;  // chunks whose loads are under way together
    const Partial first(params, tile, place, 0);
    const int chunks = place.num_splits;
    const uint64_t read_once = ptx::evict_first();
    const int lane = threadIdx.x % 16;
    const int row_of_octet = min(lane / 2, first.octet_rows(octet) - 1);  // past a cut octet's end the last
    const int vector_stride = 2 * first.group_stride(octet);
    const float* lse_row = first.lse + octet * kOctetRows + row_of_octet;
    const float* out = first.group(octet, group) + row_of_octet * kGroupColumns + lane % 2 * 4;
    ChunkSum row_sum;
    float4 sum[kVectors] = {};
#pragma unroll 1
    for (int begin = 0; begin < chunks; begin += kUnroll) {
        float4 value[kUnroll][kVectors];
        float lse[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int at = begin + i == 0 ? chunks - 1 : begin + i - 1;
            if (begin + i >= chunks) break;
            lse[i] = __ldcg(lse_row + at * params.partial_rows);
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                value[i][v] = ptx::load(
                    reinterpret_cast<const float4*>(
                        out + at * static_cast<int64_t>(params.partial_rows) * kHeadDimV + v * vector_stride),
                    read_once);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            if (begin + i >= chunks) break;
            const auto factors = row_sum.add(lse[i]);
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                sum[v] = make_float4(factors(sum[v].x, value[i][v].x), factors(sum[v].y, value[i][v].y),
                                     factors(sum[v].z, value[i][v].z), factors(sum[v].w, value[i][v].w));
        }
    }
    const Row row = row_of(params, tile, piece, octet * kOctetRows + lane / 2);
    if (!row.valid) return;
    const float scale = row_sum.inverse();
    T* to = out_of<T>(params, piece.seq, row) + group * kGroupColumns + lane % 2 * 4;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<uint2*>(to + 2 * v * kGroupColumns) = make_uint2(
            pack(sum[v].x * scale, sum[v].y * scale, T()), pack(sum[v].z * scale, sum[v].w * scale, T()));
    if (group == 0 && lane % 2 == 0) *lse_of(params, piece.seq, row) = row_sum.lse();
}

// Merges the part's share of the sequences that others work on, too.
template <typename T>
__device__ inline void merge_chunks(const DecodeParams& params, const PartPlan& plan, const Phases& phases,
                                    const RowTile& tile, int consumer) {
    constexpr int kVectors = 4, kItems = kGroups / (2 * kVectors);  // a warp's work in an octet
    const int warp = threadIdx.x % kWarpgroup / 32, half = threadIdx.x % 32 / 16;
    for_each_split(params, plan, tile, [&](const Split& piece) {
        const SplitPlace part(params, plan, piece);
        if (!part.is_partial()) return;
        const SplitPlace place = first_chunk_of(params, piece, piece.seq);
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

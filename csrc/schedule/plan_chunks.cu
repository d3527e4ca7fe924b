// The batch-invariant planner: chunk_layout.py's lay_out_chunks(), byte for byte.
//
// One warp. Each lane tries a budget: it walks the sequences, filling part after part with whole chunks. Then
// all walk them with the least budget that fitted, and write the rows.
//
// Sums are 32 bits wide, as in plan.cu: of 2^31 pages and more rows are wrong, but no store goes astray.
#include "../cuda_check.h"
#include "layout.cuh"

namespace mla {
namespace {

constexpr unsigned kBudgets = 32;  // that are tried: a lane each

// chunk_layout.py's of this name.
__device__ unsigned chunk_cost(int level) {
    return level - 1;  // of 1 and 2
}

// A sequence's pages, and how they are cut into chunks. One without pages counts as one of a page.
struct Chunks {
    unsigned pages;
    unsigned length;
    unsigned cost;  // of a whole chunk
    unsigned total_cost;

    __device__ Chunks(unsigned seq_pages, int level)
        : pages(max(seq_pages, 1u)),
          length(1u << chunk_log2(seq_pages, level)),
          cost(length + chunk_cost(level)),
          total_cost(pages + ceil_div(pages, length) * chunk_cost(level)) {}
};

// Sequences handed out so far: parts are filled up to `budget`.
struct Filler {
    unsigned budget;
    unsigned part = 0;
    unsigned room;

    __device__ explicit Filler(unsigned budget) : budget(budget), room(budget) {}

    // A sequence's pieces: `head` chunks in its first part, `each` in the next ones, the rest in its last.
    struct Pieces {
        unsigned first_part;
        unsigned count;
        unsigned head;
        unsigned each;
        bool handed_over;  // the sum of the first one's chunks to the second one
    };

    __device__ Pieces take(const Chunks& chunks) {
        unsigned left = chunks.total_cost;
        if (kStartCost + min(left, chunks.cost) > room) {  // not even a chunk: in the next part
            ++part;
            room = budget;
        }
        Pieces pieces{.first_part = part, .count = 1};
        if (kStartCost + left > room) {
            pieces.head = (room - kStartCost) / chunks.cost;
            pieces.each = (budget - kStartCost) / chunks.cost;
            left -= pieces.head * chunks.cost;
            const unsigned over = kStartCost + left - min(kStartCost + left, budget);
            const unsigned step = pieces.each * chunks.cost, between = (over + step - 1) / step;
            left -= between * step;
            pieces.count = between + 2;
            part += between + 1;
            room = budget;
        }
        pieces.handed_over = pieces.count == 2 && 2 * kStartCost + chunks.total_cost <= budget;
        room -= kStartCost + left;
        return pieces;
    }
};

// Calls `work` with each sequence and its chunks, all lanes together.
template <typename Work>
__device__ void for_each_sequence(const PlanParams& params, Work&& work) {
    const unsigned batch = params.batch;
#pragma unroll 1
    for (unsigned base = 0; base < batch; base += 32) {
        const unsigned pages = load_pages(params, base + threadIdx.x);
#pragma unroll 1
        for (unsigned i = 0; i < min(32u, batch - base); ++i)
            work(base + i, Chunks(__shfl_sync(~0u, pages, i), params.chunk_level));
    }
}

// A budget, and how many parts are busy with it.
struct Choice {
    unsigned budget, busy;
};

// The least of the budgets with which there are enough parts.
__device__ Choice choose_budget(const PlanParams& params) {
    const unsigned num_parts = params.num_parts;
    unsigned total = 0, largest = 0;  // cost of all, and of the dearest chunk
    for (int seq = threadIdx.x; seq < params.batch; seq += kBudgets) {
        const Chunks chunks(pages_of(params.seq_lens[seq]), params.chunk_level);
        total += kStartCost + chunks.total_cost;
        largest = max(largest, min(chunks.length, chunks.pages));
    }
    total = __reduce_add_sync(~0u, total);
    largest = __reduce_max_sync(~0u, largest) + chunk_cost(params.chunk_level);
    const unsigned least = max(ceil_div(total, num_parts), kStartCost + largest);
    Filler filler(least + (2 * kStartCost + largest) * threadIdx.x / (kBudgets - 1));
    for_each_sequence(params, [&](unsigned, const Chunks& chunks) { filler.take(chunks); });
    const unsigned enough = __ballot_sync(~0u, filler.part < num_parts);  // the last budget always is
    const int lane = enough ? __ffs(enough) - 1 : kBudgets - 1;
    return {__shfl_sync(~0u, filler.budget, lane), __shfl_sync(~0u, filler.part, lane) + 1};
}

__global__ void __launch_bounds__(kBudgets) plan_chunks_kernel(const __grid_constant__ PlanParams params) {
    const unsigned lane = threadIdx.x;
    for (int part = lane; part < params.num_parts; part += kBudgets)
        params.parts[part] = PartPlan{.first_seq = params.batch};
    const Choice choice = choose_budget(params);
    Filler filler(choice.budget);
    unsigned splits = 0, cut = 0;  // so far: in all; sequences that have several
    unsigned last = 0, idle = 0;   // the last busy part so far, and how many idle ones lie before it
    if (lane == 0) params.num_splits[0] = 0;
    for_each_sequence(params, [&](unsigned seq, const Chunks& chunks) {
        const Filler::Pieces pieces = filler.take(chunks);
        const int count = pieces.handed_over ? -2 : static_cast<int>(pieces.count);
        if (pieces.first_part > last) idle = idle_before(params, pieces.first_part, choice.busy);
        last = pieces.first_part + pieces.count - 1;
        __syncwarp();  // rows that the sequence before wrote are there
        for (unsigned piece = lane; piece < pieces.count; piece += kBudgets) {
            const auto page_at = [&](unsigned i) {
                return i == 0 ? 0 : (pieces.head + (i - 1) * pieces.each) * chunks.length;
            };
            const unsigned part = idle + pieces.first_part + piece;
            if (part >= static_cast<unsigned>(params.num_parts)) break;
            PartPlan& row = params.parts[part];
            if (row.first_seq == params.batch) {
                row.first_seq = seq;
                row.first_page = page_at(piece);
                row.first_split = piece;
                row.first_splits = count;
                row.first_slot = part + cut;
            }
            row.last_seq = seq;
            row.last_page_end =
                piece + 1 < pieces.count ? page_at(piece + 1) : pages_of(params.seq_lens[seq]);
            row.last_splits = count;
        }
        splits += pieces.count;
        cut += pieces.count > 1;
        if (lane == 0) params.num_splits[seq + 1] = splits;
    });
}

}  // namespace

void launch_plan_chunks(const PlanParams& params, cudaStream_t stream) {
    plan_chunks_kernel<<<1, kBudgets, 0, stream>>>(params);
    CUDA_CHECK(cudaGetLastError());
}

}  // namespace mla

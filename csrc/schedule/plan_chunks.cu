// The batch-invariant planner: chunk_layout.py's lay_out_chunks(), byte for byte.
//
// One warp. Each lane tries a budget: it walks the sequences, filling part after part with whole chunks. Then
// all walk them with the least budget that fitted, each keeping what becomes of one sequence of 32, and write
// these sequences' rows, a lane a part. A walk is a chain from one sequence to the next, so what does not
// depend on those before is worked out ahead of it.
//
// Sums are 32 bits wide, as in plan.cu, and quotients right up to 2^27 pages a part: beyond, rows are wrong,
// but no store goes astray.
#include "../cuda_check.h"
#include "layout.cuh"

namespace mla {
namespace {

constexpr unsigned kLanes = 32;  // each tries a budget

// chunk_layout.py's of this name.
__device__ unsigned chunk_cost(int level) {
    return level - 1;  // of 1 and 2
}

// A sequence by its chunks. One without pages counts as one of a page.
struct Chunks {
    unsigned cost;     // of a whole chunk
    unsigned inverse;  // 2^32 / cost, rounded up; a chunk of cost 1 is all of its sequence, which is not cut
    unsigned total_cost;

    Chunks() = default;
    __device__ Chunks(unsigned seq_pages, int level) {
        const unsigned log2 = chunk_log2(seq_pages, level), pages = max(seq_pages, 1u);
        cost = (1u << log2) + chunk_cost(level);
        inverse = ~0u / cost + 1;
        total_cost = pages + (((pages - 1) >> log2) + 1) * chunk_cost(level);
    }
    // How many whole ones so much is enough for.
    __device__ unsigned fitting(unsigned room) const { return __umulhi(room, inverse); }
    // Those of another lane's sequence.
    __device__ Chunks of_lane(unsigned lane) const {
        Chunks other;
        other.cost = __shfl_sync(~0u, cost, lane);
        other.inverse = __shfl_sync(~0u, inverse, lane);
        other.total_cost = __shfl_sync(~0u, total_cost, lane);
        return other;
    }
};

// A sequence's pieces: `head` chunks in its first part, `each` in the next ones, the rest in its last.
struct Pieces {
    unsigned first_part;
    unsigned count;
    unsigned head;
    unsigned each;
    bool handed_over;  // the sum of the first one's chunks to the second one
    unsigned origin;   // the last part, up to the first one, that begins with a sequence's first page
    unsigned end;      // how many pieces all sequences have, up to this one
};

// Sequences handed out so far: parts are filled up to `budget`.
struct Filler {
    unsigned budget;
    unsigned part = 0;
    unsigned room;
    unsigned origin = 0, num_pieces = 0;

    __device__ explicit Filler(unsigned budget) : budget(budget), room(budget) {}

    // Few branches: lanes with other budgets would take the others.
    __device__ Pieces take(const Chunks& chunks) {
        const bool begins_part =
            kStartCost + min(chunks.total_cost, chunks.cost) > room;  // not even a chunk fits
        part += begins_part;
        room = begins_part ? budget : room;
        origin = begins_part ? part : origin;
        const bool is_cut = kStartCost + chunks.total_cost > room;
        Pieces pieces{.first_part = part, .count = 1u + is_cut};
        pieces.head = is_cut ? chunks.fitting(room - kStartCost) : 0;
        pieces.each = chunks.fitting(budget - kStartCost);
        unsigned left = chunks.total_cost - pieces.head * chunks.cost;
        room = is_cut ? budget : room;
        if (kStartCost + left > budget) {  // more than two parts
            const unsigned step = pieces.each * chunks.cost;
            const unsigned between = ceil_div(kStartCost + left - budget, step);
            left -= between * step;
            pieces.count += between;
        }
        part += pieces.count - 1;
        room -= kStartCost + left;
        num_pieces += pieces.count;
        pieces.origin = origin;
        pieces.end = num_pieces;
        pieces.handed_over = pieces.count == 2 && 2 * kStartCost + chunks.total_cost <= budget;
        return pieces;
    }
};

// Calls `work` with 32 sequences after 32: the first one, how many they are, and the pages of the lane's own.
template <typename Work>
__device__ void for_each_32(const PlanParams& params, Work&& work) {
    const unsigned batch = params.batch;
    unsigned next_pages = load_pages(params, threadIdx.x);
#pragma unroll 1
    for (unsigned base = 0; base < batch; base += kLanes) {
        const unsigned pages = next_pages;
        next_pages = load_pages(params, base + kLanes + threadIdx.x);
        work(base, min(kLanes, batch - base), pages);
    }
}

// Hands out `count` sequences, of as many lanes, and calls `work` with the number and the pieces of each.
template <typename Work>
__device__ void take_each(Filler& filler, const Chunks& own, unsigned count, Work&& work) {
    Chunks next = own.of_lane(0);
#pragma unroll 1
    for (unsigned i = 0; i < count; ++i) {
        const Chunks chunks = next;
        next = own.of_lane((i + 1) % kLanes);  // under way meanwhile
        work(i, filler.take(chunks));
    }
}

// A budget, and how many parts are busy with it.
struct Choice {
    unsigned budget, busy;
};

// The least of the budgets with which there are enough parts.
__device__ Choice choose_budget(const PlanParams& params) {
    const unsigned num_parts = params.num_parts;
    unsigned total = 0, dearest = 0;  // cost of all sequences; of a chunk
    for_each_32(params, [&](unsigned, unsigned count, unsigned pages) {
        const Chunks own(pages, params.chunk_level);
        if (threadIdx.x >= count) return;
        total += kStartCost + own.total_cost;
        dearest = max(dearest, min(own.cost, own.total_cost));
    });
    total = __reduce_add_sync(~0u, total);
    dearest = __reduce_max_sync(~0u, dearest);
    const unsigned least = max(ceil_div(total, num_parts), kStartCost + dearest);
    Filler filler(least + (2 * kStartCost + dearest) * threadIdx.x / (kLanes - 1));
    for_each_32(params, [&](unsigned, unsigned count, unsigned pages) {
        take_each(filler, Chunks(pages, params.chunk_level), count, [](unsigned, const Pieces&) {});
    });
    const unsigned enough = __ballot_sync(~0u, filler.part < num_parts);  // the last budget always is
    const int lane = enough ? __ffs(enough) - 1 : kLanes - 1;
    return {__shfl_sync(~0u, filler.budget, lane), __shfl_sync(~0u, filler.part, lane) + 1};
}

// What the rows tell of a sequence.
struct Placed {
    unsigned pages;
    unsigned first_part;
    unsigned last_part;   // inclusive
    unsigned head, each;  // pages that its first part works on, and each but the last one after it
    int splits;
    unsigned cut_before;  // sequences before it that have several

    // The page that a part which it is on begins at.
    __device__ int page_at(unsigned part) const {
        return part == first_part ? 0 : head + (part - first_part - 1) * each;
    }
};

// The row of a part, of sequences that are [base, base + count) of the batch.
__device__ PartPlan row_of(unsigned part, const Placed* placed, unsigned base, unsigned count,
                           unsigned batch) {
    PartPlan row{.first_seq = static_cast<int>(batch)};
    const OnPart on(placed, count, part);
    if (on.is_idle()) return row;
    const Placed &first = placed[on.ended], &last = placed[on.begun - 1];
    row.first_seq = base + on.ended;
    row.first_page = first.page_at(part);
    row.last_seq = base + on.begun - 1;
    row.last_page_end = part == last.last_part ? last.pages : last.page_at(part + 1);
    row.first_split = part - first.first_part;
    row.first_splits = first.splits;
    row.last_splits = last.splits;
    row.first_slot = part + first.cut_before;
    return row;
}

__global__ void __launch_bounds__(kLanes) plan_chunks_kernel(const __grid_constant__ PlanParams params) {
    __shared__ Placed placed[kLanes];
    const unsigned lane = threadIdx.x, batch = params.batch, num_parts = params.num_parts;
    const Choice choice = choose_budget(params);
    Filler filler(choice.budget);
    unsigned cut = 0;   // sequences so far that have several pieces
    unsigned rows = 0;  // so many are written
    if (lane == 0) params.num_splits[0] = 0;
    for_each_32(params, [&](unsigned base, unsigned count, unsigned pages) {
        Pieces own{};
        take_each(filler, Chunks(pages, params.chunk_level), count, [&](unsigned i, const Pieces& pieces) {
            if (i == lane) own = pieces;
        });
        if (lane < count) params.num_splits[base + lane + 1] = own.end;
        const unsigned several = __ballot_sync(~0u, own.count > 1), lanes_before = (1u << lane) - 1;
        const unsigned first_part = own.first_part + idle_before(params, own.origin, choice.busy);
        const unsigned log2 = chunk_log2(pages, params.chunk_level);
        __syncwarp();  // what lay there is read
        placed[lane] = {.pages = pages,
                        .first_part = first_part,
                        .last_part = first_part + own.count - 1,
                        .head = own.head << log2,
                        .each = own.each << log2,
                        .splits = own.handed_over ? -2 : static_cast<int>(own.count),
                        .cut_before = cut + __popc(several & lanes_before)};
        cut += __popc(several);
        __syncwarp();
        // The parts on these sequences; at the batch's end the idle ones too.
        const unsigned end =
            base + count == batch ? num_parts : min(num_parts, placed[count - 1].last_part + 1);
#pragma unroll 1
        for (unsigned part = min(rows, placed[0].first_part) + lane; part < end; part += kLanes)
            write_row(params, part, row_of(part, placed, base, count, batch), part < rows);
        rows = end;
    });
}

}  // namespace

void launch_plan_chunks(const PlanParams& params, cudaStream_t stream) {
    plan_chunks_kernel<<<1, kLanes, 0, stream>>>(params);
    CUDA_CHECK(cudaGetLastError());
}

}  // namespace mla

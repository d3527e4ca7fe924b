// The batch-invariant planner: chunk_layout.py's lay_out_chunks(), byte for byte.
//
// One warp. Each lane tries a budget: it walks the sequences, filling part after part with whole chunks. Then
// all walk them with the least budget that fitted, each keeping what becomes of one sequence of 32, and write
// these sequences' rows, a lane a part. A walk is a chain from one sequence to the next: all else is worked
// out beforehand.
//
// Sums are 32 bits wide, as in plan.cu: of 2^31 pages and more rows are wrong, but no store goes astray.
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
    unsigned inverse;  // 2^32 / cost, rounded up; 0 where that is 1, as of a sequence of one page
    unsigned total_cost;

    Chunks() = default;
    __device__ Chunks(unsigned pages, unsigned log2, int level)
        : cost((1u << log2) + chunk_cost(level)),
          inverse(~0u / cost + 1),
          total_cost(taken(pages) + (((taken(pages) - 1) >> log2) + 1) * chunk_cost(level)) {}

    // How many whole chunks fit into `room`. Exact below 2^27; it is used only where the sequence costs more
    // than `room`, and none costs so much, as no length has more than 2^25 pages.
    __device__ unsigned fitting(unsigned room) const { return __umulhi(room, inverse); }

    // The chunks of another lane's sequence; lane 32 is lane 0.
    __device__ Chunks of_lane(unsigned lane) const {
        Chunks other;
        other.cost = __shfl_sync(~0u, cost, lane);
        other.inverse = __shfl_sync(~0u, inverse, lane);
        other.total_cost = __shfl_sync(~0u, total_cost, lane);
        return other;
    }
};

// What becomes of a sequence: the parts that it is on, `count` from `first_part` on.
struct Pieces {
    unsigned first_part;
    unsigned count;
    unsigned head;    // if it is cut: chunks in its first part
    unsigned origin;  // the last part, up to `first_part`, that no sequence reaches into from the part before
    unsigned end;     // pieces of all sequences so far, this one's included
};

// What a sequence does to a part that has room for a chunk of it at least.
struct Fit {
    bool is_cut;
    unsigned head;  // if it is cut: chunks in this part
    unsigned room;  // left where it ends, here or in the next part; negative, if these two are not enough

    __device__ Fit(const Chunks& chunks, unsigned room_before, unsigned budget)
        : is_cut(kStartCost + chunks.total_cost > room_before),
          head(chunks.fitting(room_before - kStartCost)) {
        const unsigned in_next = budget - kStartCost - (chunks.total_cost - head * chunks.cost);
        room = is_cut ? in_next : room_before - kStartCost - chunks.total_cost;
    }
};

// Sequences handed out so far: parts are filled up to `budget`.
struct Filler {
    unsigned budget;
    unsigned part = 0;
    unsigned room;
    unsigned origin = 0, end = 0;  // as in Pieces

    __device__ explicit Filler(unsigned budget) : budget(budget), room(budget) {}

    // What it would do to an empty part is worked out beside what it does to this one, so that the chain from
    // the room before to the room after is short; and lanes with other budgets take the same branches.
    __device__ Pieces take(const Chunks& chunks) {
        const Fit here(chunks, room, budget), in_empty(chunks, budget, budget);
        const bool begins_part = kStartCost + min(chunks.total_cost, chunks.cost) > room;
        part += begins_part;
        origin = begins_part ? part : origin;
        const bool is_cut = begins_part ? in_empty.is_cut : here.is_cut;
        room = begins_part ? in_empty.room : here.room;
        unsigned count = 1 + is_cut;
        if (kStartCost + chunks.total_cost > budget + chunks.cost) {  // two parts may not be enough
            const unsigned step = in_empty.head * chunks.cost;
            const unsigned between = ceil_div(static_cast<int>(room) < 0 ? -room : 0, step);
            room += between * step;
            count += between;
        }
        end += count;
        const Pieces pieces{part, count, begins_part ? in_empty.head : here.head, origin, end};
        part += count - 1;
        return pieces;
    }
};

// The lane's own of 32 sequences.
struct Own {
    unsigned pages;
    unsigned log2;  // of a chunk's pages
    Chunks chunks;

    __device__ Own(const PlanParams& params, unsigned pages)
        : pages(pages),
          log2(chunk_log2(pages, params.chunk_level)),
          chunks(pages, log2, params.chunk_level) {}
};

// Calls `work` with 32 sequences after 32: the first one, how many they are, and the lane's own. `first`: of
// the first 32, which are not worked out again.
template <typename Work>
__device__ void for_each_32(const PlanParams& params, const Own& first, Work&& work) {
    const unsigned batch = params.batch;
    Own own = first;
#pragma unroll 1
    for (unsigned base = 0;;) {
        const unsigned next_pages = load_pages(params, base + kLanes + threadIdx.x);
        work(base, min(kLanes, batch - base), own);
        base += kLanes;
        if (base >= batch) break;
        own = Own(params, next_pages);
    }
}

// Hands out `count` sequences, of as many lanes, and calls `work` with the number and the pieces of each.
template <typename Work>
__device__ void take_each(Filler& filler, const Chunks& own, unsigned count, Work&& work) {
    Chunks next = own.of_lane(0);
#pragma unroll 1
    for (unsigned i = 0; i < count; ++i) {
        const Chunks chunks = next;
        next = own.of_lane(i + 1);  // under way meanwhile
        work(i, filler.take(chunks));
    }
}

// A budget, and how many parts are busy with it.
struct Choice {
    unsigned budget, busy;
};

// The least of the budgets with which there are enough parts.
__device__ Choice choose_budget(const PlanParams& params, const Own& first) {
    const unsigned num_parts = params.num_parts;
    unsigned total = 0, dearest = 0;  // cost of all sequences; of a chunk
    for_each_32(params, first, [&](unsigned, unsigned count, const Own& own) {
        if (threadIdx.x >= count) return;
        total += kStartCost + own.chunks.total_cost;
        dearest = max(dearest, min(own.chunks.cost, own.chunks.total_cost));
    });
    total = __reduce_add_sync(~0u, total);
    dearest = __reduce_max_sync(~0u, dearest);
    const unsigned least = max(ceil_div(total, num_parts), kStartCost + dearest);
    Filler filler(least + (2 * kStartCost + dearest) * threadIdx.x / (kLanes - 1));
    for_each_32(params, first, [&](unsigned, unsigned count, const Own& own) {
        take_each(filler, own.chunks, count, [](unsigned, const Pieces&) {});
    });
    const unsigned enough = __ballot_sync(~0u, filler.part < num_parts);  // the last budget always is
    const int lane = enough ? __ffs(enough) - 1 : kLanes - 1;
    return {__shfl_sync(~0u, filler.budget, lane), __shfl_sync(~0u, filler.part, lane) + 1};
}

// What the rows tell of a sequence.
struct Placed {
    unsigned pages;
    unsigned first_part;
    unsigned last_part;  // inclusive
    unsigned head;       // if it is cut: pages that its first part works on
    unsigned each;       // and each of the next ones but the last
    int splits;
    unsigned cut_before;  // sequences before it that have several

    // The page that a part which it is on begins at.
    __device__ unsigned page_at(unsigned part) const {
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
    const Own first_own(params, load_pages(params, lane));
    const Choice choice = choose_budget(params, first_own);
    Filler filler(choice.budget);
    unsigned cut = 0;   // sequences so far that have several pieces
    unsigned rows = 0;  // so many are written
    if (lane == 0) params.num_splits[0] = 0;
    for_each_32(params, first_own, [&](unsigned base, unsigned count, const Own& own) {
        Pieces pieces{};  // of the lane's own
        take_each(filler, own.chunks, count, [&](unsigned i, const Pieces& taken) {
            if (i == lane) pieces = taken;
        });
        if (lane < count) params.num_splits[base + lane + 1] = pieces.end;
        const unsigned several = __ballot_sync(~0u, pieces.count > 1), lanes_before = (1u << lane) - 1;
        const unsigned first_part = pieces.first_part + idle_before(params, pieces.origin, choice.busy);
        const bool handed_over = pieces.count == 2 && 2 * kStartCost + own.chunks.total_cost <= choice.budget;
        __syncwarp();  // what lay there is read
        placed[lane] = {.pages = own.pages,
                        .first_part = first_part,
                        .last_part = first_part + pieces.count - 1,
                        .head = pieces.head << own.log2,
                        .each = own.chunks.fitting(choice.budget - kStartCost) << own.log2,
                        .splits = handed_over ? -2 : static_cast<int>(pieces.count),
                        .cut_before = cut + __popc(several & lanes_before)};
        cut += __popc(several);
        __syncwarp();
        // The parts on these sequences, and idle ones before them; at the batch's end those behind, too.
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

// The planner: schedule.py's plan(), computed on the GPU in one launch, byte for byte.
//
// A block takes a sequence a thread to find the parts that each sequence is on, then a part a thread to write
// the parts' rows. A batch of more sequences than threads takes several rounds, and only there lengths are
// read again. Where there are several blocks, each computes the whole plan and writes rows of its own.
//
// Sums are 32 bits wide: the pages of a batch are less than 2^31, and the parts no more than 2^16. Beyond,
// rows are wrong (a quotient by 0 is some number), but no store goes astray, as each thread writes a row of
// its own.
#include "../cuda_check.h"
#include "layout.cuh"

namespace mla {
namespace {

constexpr int kManyWarps = 16;

// The row of a part, of sequences that are [base, base + count) of the batch.
__device__ PartPlan row_of(unsigned part, const Layout& layout, const Sequence* sequences, unsigned base,
                           unsigned count, unsigned batch) {
    PartPlan row{.first_seq = static_cast<int>(batch)};
    const OnPart on(sequences, count, part);
    if (on.is_idle()) return row;

    const Sequence &first = sequences[on.ended], &last = sequences[on.begun - 1];
    unsigned page, page_end;
    if (layout.split > 0) {  // one split: first and last are the same sequence
        const Shares splits(first.pages, first.splits());
        page = splits.begin(part - first.first_part);
        page_end = splits.begin(part - first.first_part + 1);
    } else if (layout.whole) {
        page = 0;
        page_end = last.pages;
    } else {
        page = layout.page_at(first, part);
        page_end = layout.page_at(last, part + 1);
    }
    row.first_seq = base + on.ended;
    row.first_page = page;
    row.last_seq = base + on.begun - 1;
    row.last_page_end = page_end;
    row.first_split = part - first.first_part;
    row.first_splits = first.splits();
    row.last_splits = last.splits();
    row.first_slot = part + first.cut_before;
    return row;
}

static_assert(kFewSequences == 32);  // of one warp

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps) plan_kernel(const __grid_constant__ PlanParams params) {
    constexpr unsigned kThreads = 32 * kWarps;
    constexpr bool kOneRound = kWarps == 1;  // the batch has no more sequences than the block has threads
    __shared__ Sequence sequences[kThreads];
    const unsigned thread = threadIdx.x, batch = params.batch, num_parts = params.num_parts;
    unsigned pages = load_pages(params, thread);

    unsigned length[1] = {}, longest = 0;  // of the line; of the thread's sequences
    for_own_sequences<kWarps>(params, pages, [&](unsigned n) {
        length[0] += kStartCost + taken(n);
        longest = max(longest, taken(n));
    });
    block_sum<kWarps>(length);
    const Shares line(length[0], num_parts);
    Layout layout{.line = line};
    if (batch > num_parts) {
        layout.whole = fits_whole<kWarps>(params, pages, line, sequences);
    } else {
        const unsigned least =
            params.few_rows ? least_of_few_rows(num_parts, longest, length[0] - kStartCost * batch) : 1;
        layout.split = split_length<kWarps>(params, pages, least, line.longest(), layout.busy);
        if (take_two_pages(params, layout.split, layout.busy, longest)) {
            layout.split = 2;
            layout.busy = count_splits<kWarps>(params, pages, 2);
        }
        const unsigned most = most_whole(params, line.longest());
        if (layout.split == 0 && __syncthreads_and(kStartCost + longest <= most)) {
            layout.split = most;  // so many pages: none is cut
            layout.busy = batch;
        }
    }
    unsigned given = 0;  // to the thread's sequence, of the parts left over; whole ones want none
    if constexpr (kOneRound) {
        if (!params.few_rows && layout.split >= (params.one_tile ? kLongSplits : kLongSplitsOfTiles)) {
            given = given_out(layout.extent(pages), num_parts - layout.busy, batch);
            layout.busy += __reduce_add_sync(~0u, given);
        }
    }

    // Sums over the rounds before: extents; splits and cut sequences; rows.
    unsigned extents[1] = {}, splits[2] = {}, rows = 0;
    for (unsigned base = 0;;) {
        const unsigned seq = base + thread, count = kOneRound ? batch : min(batch - base, kThreads);
        const bool active = thread < count;
        const unsigned extent = active ? layout.extent(pages) + given : 0;
        unsigned begin[1] = {extent};
        block_scan<kWarps>(begin, extents, count);
        Sequence sequence{.pages = pages};
        layout.place(params, sequence, begin[0], extent);
        unsigned before[2] = {active ? sequence.splits() : 0, active && sequence.splits() > 1};
        block_scan<kWarps>(before, splits, count);
        sequence.cut_before = before[1];
        sequences[thread] = sequence;
        if (active && blockIdx.x == 0) params.num_splits[seq + 1] = before[0] + sequence.splits();
        __syncthreads();

        // The parts on these sequences; at the batch's end the idle ones too.
        const bool at_end = kOneRound || base + count == batch;
        // Idle ones between two rounds belong to the later one.
        const unsigned first = kOneRound ? 0 : min(rows, sequences[0].first_part);
        const unsigned end = at_end ? num_parts : min(num_parts, sequences[count - 1].last_part + 1);
#pragma unroll 1
        for (unsigned part = first + blockIdx.x * kThreads + thread; part < end;
             part += gridDim.x * kThreads) {
            write_row(params, part, row_of(part, layout, sequences, base, count, batch),
                      !kOneRound && part < rows);
        }
        rows = end;
        if (kOneRound || at_end) break;
        __syncthreads();  // these rows are written, and `sequences` is read
        base += kThreads;
        pages = load_pages(params, base + thread);
    }
    if (thread == 0 && blockIdx.x == 0) params.num_splits[0] = 0;
}

}  // namespace

void launch_plan(const PlanParams& params, cudaStream_t stream) {
    // A warp that holds the batch has no other to wait for, and one of them for 32 parts writes a row a
    // thread.
    if (params.batch <= kFewSequences) {
        plan_kernel<1><<<(params.num_parts + 31) / 32, 32, 0, stream>>>(params);
    } else {
        plan_kernel<kManyWarps><<<1, 32 * kManyWarps, 0, stream>>>(params);
    }
    CUDA_CHECK(cudaGetLastError());
}

}  // namespace mla

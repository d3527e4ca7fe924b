// Where the planner lays sequences: layout.py's _a_split_a_part, _whole_sequences and _on_a_line; and what
// both planners have in common: which sequences a part is on, how its row is written.
#pragma once

#include "../params.h"
#include "block_sums.cuh"

namespace mla {

__device__ inline unsigned ceil_div(unsigned a, unsigned b) {
    return (a + b - 1) / b;
}

// A total cut into even shares: the first `rest` of them have one more than `length`.
struct Shares {
    unsigned length, rest;

    __device__ Shares(unsigned total, unsigned ways) : length(total / ways), rest(total - length * ways) {}
    __device__ unsigned begin(unsigned number) const { return number * length + min(number, rest); }
    __device__ unsigned longest() const { return length + (rest > 0); }

    // The share that has `place`.
    __device__ unsigned holder(unsigned place) const {
        const unsigned longer = rest * (length + 1);  // places of the longer shares
        const bool in_longer = place < longer;
        return (in_longer ? 0 : rest) + (place - (in_longer ? 0 : longer)) / (length + in_longer);
    }
};

// What the rows tell of a sequence.
struct Sequence {
    unsigned pages;
    unsigned page_0;  // its place on the line
    unsigned first_part;
    unsigned last_part;   // inclusive
    unsigned cut_before;  // sequences before it that have several splits

    __device__ unsigned splits() const { return last_part - first_part + 1; }
};

// Which of `count` sequences, which lie in order from a `first_part` to a `last_part`, a part is on: those
// from `ended` up to `begun`.
struct OnPart {
    unsigned ended = 0;  // so many end before the part
    unsigned begun = 0;  // and so many begin by it

    template <typename Extent>
    __device__ OnPart(const Extent* sequences, unsigned count, unsigned part) {
        // Two binary searches, side by side.
#pragma unroll 1
        for (unsigned step = 1u << (31 - __clz(count)); step > 0; step /= 2) {
            if (ended + step <= count && sequences[ended + step - 1].last_part < part) ended += step;
            if (begun + step <= count && sequences[begun + step - 1].first_part <= part) begun += step;
        }
    }
    __device__ bool is_idle() const { return begun <= ended; }
};

// Writes a part's row; if it has sequences of the round before, too, only what it ends with.
__device__ inline void write_row(const PlanParams& params, unsigned part, const PartPlan& row,
                                 bool began_before) {
    PartPlan& to = params.parts[part];
    if (!began_before) {
        to = row;
    } else {
        to.last_seq = row.last_seq;
        to.last_page_end = row.last_page_end;
        to.last_splits = row.last_splits;
    }
}

// Pages of a sequence; past the batch's end none.
__device__ inline unsigned load_pages(const PlanParams& params, unsigned seq) {
    return seq < static_cast<unsigned>(params.batch) ? pages_of(params.seq_lens[seq]) : 0;
}

// Calls `work` with the pages of each of the thread's sequences; those of the first, `pages`, are loaded.
template <int kWarps, typename Work>
__device__ inline void for_own_sequences(const PlanParams& params, unsigned pages, Work&& work) {
    const unsigned batch = params.batch;
    if (threadIdx.x < batch) work(pages);
    if constexpr (kWarps > 1)
#pragma unroll 1
        for (unsigned seq = threadIdx.x + 32 * kWarps; seq < batch; seq += 32 * kWarps)
            work(load_pages(params, seq));
}

// Pages that a sequence counts as: an empty one takes its place too, as its result is to be written.
__device__ inline unsigned taken(unsigned pages) {
    return max(pages, 1u);
}

// layout.py's _num_splits.
__device__ inline unsigned num_splits(unsigned pages, unsigned length) {
    return pages <= kPartialCost + 1 ? 1 : ceil_div(pages, length);
}

// layout.py's of this name. `longest`: what the longest of the thread's sequences takes; `taken_pages`:
// what all take.
__device__ inline unsigned least_of_few_rows(unsigned num_parts, unsigned longest, unsigned taken_pages) {
    const unsigned half = ceil_div(taken_pages, max(num_parts / 2, 1u));
    const unsigned few_pages = taken_pages > kFewPages / 2 * num_parts ? kFewPages : kFewPages / 2;
    const bool whole = __syncthreads_and(longest <= min(half, kWholePages));
    return whole ? half : min(half, few_pages);
}

// How many splits of up to `length` pages all sequences have.
template <int kWarps>
__device__ inline unsigned count_splits(const PlanParams& params, unsigned pages, unsigned length) {
    unsigned splits[1] = {};
    for_own_sequences<kWarps>(params, pages, [&](unsigned n) { splits[0] += num_splits(n, length); });
    block_sum<kWarps>(splits);
    return splits[0];
}

// The least length of splits, of those that layout.py's _a_split_a_part looks at, with which a split a part
// is enough; 0 where there is none. `share`: of the line; `busy`: becomes how many splits that are.
template <int kWarps>
__device__ inline unsigned split_length(const PlanParams& params, unsigned pages, unsigned least,
                                        unsigned share, unsigned& busy) {
    const auto length = [=](unsigned i) { return max(least, share + i - min(share + i, kStartCost)); };
    unsigned low = 0, high = kStartCost + 1 + kPartialCost;  // of the lengths; `high` stands for none
    // Few short sequences mostly take the least of all: it is tried first.
    bool try_least = share <= kStartCost + least;
#pragma unroll 1
    while (low < high) {
        const unsigned middle = try_least ? low : (low + high) / 2;
        try_least = false;
        const unsigned splits = count_splits<kWarps>(params, pages, length(middle));
        const bool enough = splits <= static_cast<unsigned>(params.num_parts);
        busy = enough ? splits : busy;
        high = enough ? middle : high;
        low = enough ? low : middle + 1;
    }
    return low <= kStartCost + kPartialCost ? length(low) : 0;
}

// layout.py's _give_out: how many of `spare` parts the thread's sequence, which has `splits`, takes.
__device__ inline unsigned given_out(unsigned splits, unsigned spare, unsigned batch) {
    const unsigned wanted = threadIdx.x < batch ? splits / kSplitsASpare : 0;
    unsigned before[1] = {wanted}, all[1] = {};
    block_scan<1>(before, all, batch);
    const unsigned behind = all[0] - before[0] - wanted;
    return min(behind + wanted, spare) - min(behind, spare);
}

// layout.py's of this name.
__device__ inline unsigned most_whole(const PlanParams& params, unsigned share) {
    const unsigned divisor = params.batch > params.num_parts ? 8 : params.few_rows ? 2 : 4;
    const unsigned more = params.one_tile ? share / divisor : 0;
    return share + more + kCutCost;
}

// Whether splits of one page have two: TWO_PAGE_SPLITS of layout.py. `longest`: least_of_few_rows'.
__device__ inline bool take_two_pages(const PlanParams& params, unsigned split, unsigned busy,
                                      unsigned longest) {
    if (!params.full_tiles || split != 1 || 100 * busy <= kBusyPercent * params.num_parts) return false;
    return __syncthreads_or(longest > kTwoPageSplits) && !__syncthreads_or(longest > 2 * kTwoPageSplits);
}

// layout.py's of this name.
__device__ inline unsigned idle_before(const PlanParams& params, unsigned begin, unsigned busy) {
    const unsigned dense = params.few_rows ? first_of_last_half(params.num_parts) : 0;
    if (!params.one_tile || begin <= dense) return 0;
    return (params.num_parts - busy) * (begin - dense) / (busy - dense);
}

// How the plan lays sequences out.
struct Layout {
    unsigned split = 0;  // pages of a split at most, of which each has a part of its own; 0: on a line
    unsigned busy = 0;   // how many parts are, with `split`
    bool whole = false;  // on a line: nothing is cut
    Shares line;

    // How many pages a cut on the line may be moved by: _Line's.
    __device__ unsigned reach() const {
        return min(kPartialCost, (max(line.length, kStartCost + 1) - kStartCost - 1) / 2);
    }
    // The page of a sequence on the line that a part begins at.
    __device__ unsigned page_at(const Sequence& seq, unsigned part) const {
        const unsigned begin = line.begin(part), before = min(begin - min(begin, seq.page_0), seq.pages);
        const unsigned after = seq.pages - before;
        const unsigned nearest = before <= after ? 0 : seq.pages;
        return min(before, after) > reach() ? before : nearest;
    }

    // Of parts with a split each, or of places on the line.
    __device__ unsigned extent(unsigned pages) const {
        return split > 0 ? num_splits(pages, split) : kStartCost + taken(pages);
    }

    __device__ void place(const PlanParams& params, Sequence& seq, unsigned begin, unsigned extent) const {
        seq.page_0 = begin + kStartCost;
        if (split > 0) {
            // Threads without a sequence leave out the division: a single one needs none.
            seq.first_part = begin + (extent > 0 ? idle_before(params, begin, busy) : 0);
            seq.last_part = seq.first_part + extent - 1;
            return;
        }
        seq.first_part = line.holder(whole ? begin + extent / 2 : seq.page_0);
        seq.last_part = whole ? seq.first_part : line.holder(begin + extent - 1);
        if (seq.first_part < seq.last_part) {
            const unsigned second_page = page_at(seq, seq.first_part + 1);
            const unsigned last_page = page_at(seq, seq.last_part);
            seq.first_part += second_page == 0;
            seq.last_part -= last_page == seq.pages;
        }
    }
};

// How many of `count` sequences, which lie in order, come first that begin before the part.
__device__ inline unsigned count_before(const Sequence* sequences, unsigned count, unsigned part) {
    unsigned found = 0;
#pragma unroll 1
    for (unsigned step = 1u << (31 - __clz(count)); step > 0; step /= 2)
        if (found + step <= count && sequences[found + step - 1].first_part < part) found += step;
    return found;
}

// Whether no part costs more than `most_whole` if no sequence is cut. `pages`: of the thread's first.
template <int kWarps>
__device__ inline bool fits_whole(const PlanParams& params, unsigned pages, const Shares& line,
                                  Sequence* sequences) {
    constexpr unsigned kThreads = 32 * kWarps;
    const Layout layout{.whole = true, .line = line};
    const unsigned thread = threadIdx.x, batch = params.batch;
    const unsigned most = most_whole(params, line.longest());
    unsigned extents[1] = {};
    unsigned last_part = ~0u, last_begin = 0;  // of the round before: its last part, and where that begins
    for (unsigned base = 0;;) {
        const unsigned count = min(batch - base, kThreads), extent = layout.extent(pages);
        unsigned begin[1] = {thread < count ? extent : 0};
        block_scan<kWarps>(begin, extents, count);
        layout.place(params, sequences[thread], begin[0], extent);
        __syncthreads();
        const auto begin_of = [&](unsigned part) {  // of a part that a sequence of this round is on
            // within `sequences` even where sums have overflowed
            const unsigned first = min(count_before(sequences, count, part), count - 1);
            return first == 0 && part == last_part ? last_begin : sequences[first].page_0 - kStartCost;
        };
        const bool fits =
            thread >= count || begin[0] + extent - begin_of(sequences[thread].first_part) <= most;
        if (!__syncthreads_and(fits)) return false;
        if (base + count == batch) return true;
        last_begin = begin_of(sequences[count - 1].first_part);
        last_part = sequences[count - 1].first_part;
        __syncthreads();  // `sequences` is read
        base += kThreads;
        pages = load_pages(params, base + thread);
    }
}

}  // namespace mla

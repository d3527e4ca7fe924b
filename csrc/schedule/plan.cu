// The planner: schedule.py's plan(), computed on the GPU in one launch, byte for byte.
//
// A block takes a sequence a thread to find the parts that each sequence is on, then a part a thread to write
// the parts' rows. A batch of more sequences than threads takes several rounds, and only there lengths are
// read again. Where there are several blocks, each computes the whole plan and writes rows of its own.
//
// Sums are 32 bits wide: the pages of a batch are less than 2^31. Beyond, rows are wrong, but no store goes
// astray, as each thread writes a row of its own.
#include "../cuda_check.h"
#include "../params.h"

namespace mla {
namespace {

constexpr int kManyWarps = 16;

__device__ unsigned ceil_div(unsigned a, unsigned b) {
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

// Replaces each value with its sum over the block.
template <int kWarps, int N>
__device__ void block_sum(unsigned (&value)[N]) {
    __shared__ unsigned of_warp[kWarps][N];
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = __reduce_add_sync(~0u, value[i]);
    if constexpr (kWarps > 1) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (lane == 0) of_warp[threadIdx.x / 32][i] = value[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] = __reduce_add_sync(~0u, lane < kWarps ? of_warp[lane][i] : 0);
    }
}

// Replaces each value with the sum over `carry` and the threads before; carry grows by the block's sum.
// Threads from `count` on have zeros.
template <int kWarps, int N>
__device__ void block_scan(unsigned (&value)[N], unsigned (&carry)[N], unsigned count) {
    __shared__ unsigned of_warp[kWarps][N];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned sum[N];  // of the warp, then of the block
#pragma unroll
    for (int i = 0; i < N; ++i) {
        sum[i] = __reduce_add_sync(~0u, value[i]);
        if (kWarps > 1 && lane == 0) of_warp[warp][i] = sum[i];
    }
    unsigned inclusive[N];
#pragma unroll
    for (int i = 0; i < N; ++i) inclusive[i] = value[i];
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
        if (step >= count) break;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const unsigned below = __shfl_up_sync(~0u, inclusive[i], step);
            if (lane >= step) inclusive[i] += below;
        }
    }
    if constexpr (kWarps > 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        value[i] = carry[i] + inclusive[i] - value[i];
        if constexpr (kWarps > 1) {
            const unsigned other = lane < kWarps ? of_warp[lane][i] : 0;
            value[i] += __reduce_add_sync(~0u, lane < warp ? other : 0);
            sum[i] = __reduce_add_sync(~0u, other);
        }
        carry[i] += sum[i];
    }
}

// Pages of a sequence; past the batch's end none.
__device__ unsigned load_pages(const PlanParams& params, unsigned seq) {
    return seq < static_cast<unsigned>(params.batch) ? pages_of(params.seq_lens[seq]) : 0;
}

// Calls `work` with the pages of each of the thread's sequences; those of the first, `pages`, are loaded.
template <int kWarps, typename Work>
__device__ void for_own_sequences(const PlanParams& params, unsigned pages, Work&& work) {
    const unsigned batch = params.batch;
    if (threadIdx.x < batch) work(pages);
    if constexpr (kWarps > 1)
#pragma unroll 1
        for (unsigned seq = threadIdx.x + 32 * kWarps; seq < batch; seq += 32 * kWarps)
            work(load_pages(params, seq));
}

// Pages that a sequence counts as: an empty one takes its place too, as its result is to be written.
__device__ unsigned taken(unsigned pages) {
    return max(pages, 1u);
}

// The least length of splits, from `least` to `most`, with which a split a part is enough; 0 where there is
// none.
template <int kWarps>
__device__ unsigned split_length(const PlanParams& params, unsigned pages, unsigned least, unsigned most) {
    const unsigned num_parts = params.num_parts;
    const auto length = [=](unsigned less) { return most > least + less ? most - less : least; };
    unsigned splits[kStartCost + 1] = {};  // with a length of most, most - 1, ...
    for_own_sequences<kWarps>(params, pages, [&](unsigned n) {
#pragma unroll
        for (unsigned less = 0; less <= kStartCost; ++less) splits[less] += ceil_div(taken(n), length(less));
    });
    block_sum<kWarps>(splits);
    unsigned found = 0;
#pragma unroll
    for (unsigned less = 0; less <= kStartCost; ++less)
        if (splits[less] <= num_parts) found = length(less);
    return found;
}

// How the plan lays sequences out: `split` pages a part at most; where `split` is 0 on a line, cut or not.
struct Layout {
    unsigned split;
    bool whole;
    Shares line;

    // Of parts with a split each, or of places on the line.
    __device__ unsigned extent(unsigned pages) const {
        return split > 0 ? ceil_div(taken(pages), split) : kStartCost + taken(pages);
    }

    __device__ void place(Sequence& seq, unsigned begin, unsigned extent) const {
        const unsigned last = begin + extent - 1;
        seq.page_0 = begin + kStartCost;
        seq.first_part = split > 0 ? begin : line.holder(whole ? begin + extent / 2 : seq.page_0);
        seq.last_part = split > 0 ? last : whole ? seq.first_part : line.holder(last);
    }
};

// How many of `count` sequences, which lie in order, come first that begin before the part.
__device__ unsigned count_before(const Sequence* sequences, unsigned count, unsigned part) {
    unsigned found = 0;
#pragma unroll 1
    for (unsigned step = 1u << (31 - __clz(count)); step > 0; step /= 2)
        if (found + step <= count && sequences[found + step - 1].first_part < part) found += step;
    return found;
}

// Whether no part gets more than its share and a start if no sequence is cut. `pages`: of the thread's first.
template <int kWarps>
__device__ bool fits_whole(const PlanParams& params, unsigned pages, const Shares& line,
                           Sequence* sequences) {
    constexpr unsigned kThreads = 32 * kWarps;
    const Layout layout{0, true, line};
    const unsigned thread = threadIdx.x, batch = params.batch, most = line.longest() + kStartCost;
    unsigned extents[1] = {};
    unsigned last_part = ~0u, last_begin = 0;  // of the round before: its last part, and where that begins
    for (unsigned base = 0;;) {
        const unsigned count = min(batch - base, kThreads), extent = layout.extent(pages);
        unsigned begin[1] = {thread < count ? extent : 0};
        block_scan<kWarps>(begin, extents, count);
        layout.place(sequences[thread], begin[0], extent);
        __syncthreads();
        const auto begin_of = [&](unsigned part) {  // of a part that a sequence of this round is on
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

// The row of a part, of sequences that are [base, base + count) of the batch.
__device__ PartPlan row_of(unsigned part, const Layout& layout, const Sequence* sequences, unsigned base,
                           unsigned count, unsigned batch) {
    // How many of them end before the part, and how many begin by it: two binary searches, side by side.
    unsigned ended = 0, begun = 0;
#pragma unroll 1
    for (unsigned step = 1u << (31 - __clz(count)); step > 0; step /= 2) {
        if (ended + step <= count && sequences[ended + step - 1].last_part < part) ended += step;
        if (begun + step <= count && sequences[begun + step - 1].first_part <= part) begun += step;
    }
    PartPlan row{.first_seq = static_cast<int>(batch)};
    if (begun <= ended) return row;

    const Sequence &first = sequences[ended], &last = sequences[begun - 1];
    unsigned page, page_end;
    if (layout.split > 0) {  // one split: first and last are the same sequence
        const Shares splits(first.pages, first.splits());
        page = splits.begin(part - first.first_part);
        page_end = splits.begin(part - first.first_part + 1);
    } else if (layout.whole) {
        page = 0;
        page_end = last.pages;
    } else {
        const unsigned begin = layout.line.begin(part), end = layout.line.begin(part + 1);
        page = begin - min(begin, first.page_0);
        page_end = min(last.pages, end - min(end, last.page_0));
    }
    row.first_seq = base + ended;
    row.first_page = page;
    row.last_seq = base + begun - 1;
    row.last_page_end = page_end;
    row.first_split = part - first.first_part;
    row.first_splits = first.splits();
    row.last_splits = last.splits();
    row.first_slot = part + first.cut_before;
    return row;
}

template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps) plan_kernel(const __grid_constant__ PlanParams params) {
    constexpr unsigned kThreads = 32 * kWarps;
    constexpr bool kOneRound = kWarps == 1;  // the batch has no more sequences than the block has threads
    __shared__ Sequence sequences[kThreads];
    const unsigned thread = threadIdx.x, batch = params.batch, num_parts = params.num_parts;
    unsigned pages = load_pages(params, thread);

    unsigned sums[2] = {};  // the line's length; sequences of more than kWholePages
    for_own_sequences<kWarps>(params, pages, [&](unsigned n) {
        sums[0] += kStartCost + taken(n);
        sums[1] += taken(n) > kWholePages;
    });
    block_sum<kWarps>(sums);
    const Shares line(sums[0], num_parts);
    const unsigned taken_pages = sums[0] - kStartCost * batch;
    const unsigned few_pages = sums[1] == 0 ? kWholePages : kFewPages;
    const unsigned least =
        params.few_rows ? max(min(few_pages, ceil_div(taken_pages, max(num_parts / 2, 1u))), 1u) : 1;
    const unsigned most = max(least, line.longest());
    const unsigned split = batch > num_parts ? 0 : split_length<kWarps>(params, pages, least, most);
    const Layout layout{split, split == 0 && fits_whole<kWarps>(params, pages, line, sequences), line};

    // Sums over the rounds before: extents; splits and cut sequences; rows.
    unsigned extents[1] = {}, splits[2] = {}, rows = 0;
    for (unsigned base = 0;;) {
        const unsigned seq = base + thread, count = kOneRound ? batch : min(batch - base, kThreads);
        const bool active = thread < count;
        const unsigned extent = active ? layout.extent(pages) : 0;
        unsigned begin[1] = {extent};
        block_scan<kWarps>(begin, extents, count);
        Sequence sequence{.pages = pages};
        layout.place(sequence, begin[0], extent);
        unsigned before[2] = {active ? sequence.splits() : 0, active && sequence.splits() > 1};
        block_scan<kWarps>(before, splits, count);
        sequence.cut_before = before[1];
        sequences[thread] = sequence;
        if (active && blockIdx.x == 0) params.num_splits[seq + 1] = before[0] + sequence.splits();
        __syncthreads();

        // The parts on these sequences; at the batch's end the idle ones too.
        const bool at_end = kOneRound || base + count == batch;
        const unsigned first = kOneRound ? 0 : sequences[0].first_part;
        const unsigned end = at_end ? num_parts : min(num_parts, sequences[count - 1].last_part + 1);
#pragma unroll 1
        for (unsigned part = first + blockIdx.x * kThreads + thread; part < end;
             part += gridDim.x * kThreads) {
            const PartPlan row = row_of(part, layout, sequences, base, count, batch);
            PartPlan& to = params.parts[part];
            if (kOneRound || part >= rows) {
                to = row;
            } else {  // it began in the round before
                to.last_seq = row.last_seq;
                to.last_page_end = row.last_page_end;
                to.last_splits = row.last_splits;
            }
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
    if (params.batch <= 32) {
        plan_kernel<1><<<(params.num_parts + 31) / 32, 32, 0, stream>>>(params);
    } else {
        plan_kernel<kManyWarps><<<1, 32 * kManyWarps, 0, stream>>>(params);
    }
    CUDA_CHECK(cudaGetLastError());
}

}  // namespace mla

// The planner: schedule.py's plan(), computed on the GPU in one launch, byte for byte.
#include "../cuda_check.h"
#include "../params.h"

namespace mla {
namespace {

constexpr int kStartCost = 3;  // pages; START_COST of schedule.py
constexpr int kThreads = 256;
constexpr int kPagesInShared = 8192;  // longer batches read their lengths from global memory each time

// Pages of each sequence, from shared memory where they fit.
struct Pages {
    const int* seq_lens;
    const int* shared;
    bool in_shared;
    __device__ int operator[](int seq) const { return in_shared ? shared[seq] : pages_of(seq_lens[seq]); }
};

// How many parts the batch takes when each may spend `budget` pages, starts included.
__device__ int parts_needed(const Pages& pages, int batch, int budget) {
    int parts = 1, left = budget;
    const int full = budget - kStartCost;
    for (int seq = 0; seq < batch; ++seq) {
        const int n = pages[seq];
        if (kStartCost + n <= left) {
            left -= kStartCost + n;
            continue;
        }
        const int rest = n - max(0, left - kStartCost);
        const int extra = max(1, (rest + full - 1) / full);
        parts += extra;
        left = full - (rest - (extra - 1) * full);
    }
    return parts;
}

// Every lane tries one budget; the least that fits wins. START_COST + 1 of them always suffice.
__device__ int smallest_budget(const Pages& pages, int batch, int num_parts, int total_pages) {
    const int fair = max(1, (total_pages + kStartCost * batch + num_parts - 1) / num_parts);
    const int budget = max(fair, kStartCost + 1) + static_cast<int>(threadIdx.x);
    const bool fits = threadIdx.x <= kStartCost && parts_needed(pages, batch, budget) <= num_parts;
    const int winner = __ffs(static_cast<int>(__ballot_sync(~0u, fits))) - 1;
    return __shfl_sync(~0u, budget, winner);
}

// Hands the pages out part by part, as plan() of schedule.py does.
__device__ void write_plan(const PlanParams& params, const Pages& pages, int budget) {
    int seq = 0, page = 0, split = 0, splits_before = 0, merged = 0;
    params.num_splits[0] = 0;
    for (int part = 0; part < params.num_parts; ++part) {
        PartPlan plan{};
        plan.first_seq = seq;
        plan.merge_seq = -1;
        if (seq < params.batch) {
            plan.first_page = page;
            plan.first_split = split;
        }
        int left = budget;
        while (seq < params.batch) {
            const int rest = pages[seq] - page;
            if (kStartCost + rest <= left) {  // the sequence ends in this part
                left -= kStartCost + rest;
                if (split > 0) {  // the list's rows lag behind: this one is written already
                    PartPlan& row = params.parts[merged++];
                    row.merge_seq = seq;
                    row.merge_first_slot = splits_before;
                    row.merge_splits = split + 1;
                }
                splits_before += split + 1;
                params.num_splits[seq + 1] = splits_before;
                plan.last_seq = seq;
                plan.last_page_end = page + rest;
                ++seq, page = 0, split = 0;
                continue;
            }
            if (left > kStartCost) {  // the sequence is cut here
                page += left - kStartCost;
                ++split;
                plan.last_seq = seq;
                plan.last_page_end = page;
            }
            break;
        }
        params.parts[part] = plan;
    }
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams params) {
    __shared__ int shared_pages[kPagesInShared];
    __shared__ int total_pages;
    if (threadIdx.x == 0) total_pages = 0;
    __syncthreads();

    const bool in_shared = params.batch <= kPagesInShared;
    int mine = 0;
    for (int seq = threadIdx.x; seq < params.batch; seq += kThreads) {
        const int n = pages_of(params.seq_lens[seq]);
        if (in_shared) shared_pages[seq] = n;
        mine += n;
    }
    atomicAdd(&total_pages, mine);
    __syncthreads();
    if (threadIdx.x >= 32) return;

    const Pages pages{params.seq_lens, shared_pages, in_shared};
    const int budget = smallest_budget(pages, params.batch, params.num_parts, total_pages);
    if (threadIdx.x == 0) write_plan(params, pages, budget);
}

}  // namespace

void launch_plan(const PlanParams& params, cudaStream_t stream) {
    plan_kernel<<<1, kThreads, 0, stream>>>(params);
    CUDA_CHECK(cudaGetLastError());
}

}  // namespace mla

// The decode kernels, as decode.cu launches them.
#pragma once

#include "../params.h"

namespace mla {

using DecodeKernel = void (*)(DecodeParams, DecodeMaps);

struct Launchable {
    DecodeKernel kernel;
    size_t shared_bytes;
};

// What arrivals.cuh has counters for.
constexpr int kMaxBlocks = 256;       // of a launch with splits; more than a Hopper GPU has SMs
constexpr int kArrivalsSlots = 1024;  // sets of counters: each launch takes the next, a captured one for good

Launchable few_rows_kernel(const DecodeParams& params);
Launchable many_rows_kernel(const DecodeParams& params);

}  // namespace mla

// Partials: the unmerged float32 results of splits, and how they lie in memory. They are sums of
// weight * value that nothing has divided yet, with the sums of the weights beside them. (Chunks that a block
// adds up by itself are their shares of the final sum, and have no such sums.)
//
// A partial has query_len x h_q rows, ordered by KV head, query token and head. A tile's follow one another,
// as it has whole tokens or heads of one; where they begin depends on the longest query, not on the
// sequence's.
//
// A tile's rows are stored in octets, the last of which may be cut off, and an octet in groups of 8 columns:
// the group's values of one row, then of the next. So a warp with many rows, whose threads hold 8 rows x 8
// columns of the output, stores 256 bytes in a line, one with few rows four of its 8 sectors at a time, and a
// warp of the merge loads lines.
#pragma once

#include "tiles.cuh"
#include "work.cuh"

namespace mla {

constexpr int kOctetRows = 8;
constexpr int kGroupColumns = 8;
constexpr int kGroups = kHeadDimV / kGroupColumns;

// A tile's partial of one split, in its slot.
struct Partial {
    float* out;
    float2* weight_sums;
    int rows;

    __device__ Partial(const DecodeParams& params, const RowTile& tile, int slot)
        : rows(tile.rows(params, params.query_len)) {
        const int token = tile.kv_head * params.query_len + tile.first_token;
        const int head = tile.first_head - tile.kv_head * params.heads_per_group;
        const int first = slot * params.partial_rows + token * params.heads_per_group + head;
        out =
            params.out_partial + static_cast<int64_t>(first) * kHeadDimV;  // of chunks there may be gigabytes
        weight_sums = params.weight_sums + first;
    }

    __device__ int octet_rows(int octet) const { return min(kOctetRows, rows - octet * kOctetRows); }
    // From a group of the octet to the next one.
    __device__ int group_stride(int octet) const { return octet_rows(octet) * kGroupColumns; }
    __device__ float* group(int octet, int group) const {
        return out + octet * kOctetRows * kHeadDimV + group * group_stride(octet);
    }
};

}  // namespace mla

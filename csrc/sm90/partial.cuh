// Partials: the unmerged float32 results of splits, and how they lie in memory. They are sums of
// weight * value that nothing has divided yet, with the sums of the weights beside them.
//
// A partial has the rows of all tiles, one tile's behind the other's; where they begin depends on the longest
// query, not on the sequence's. (Those of chunks have room for the longest tile each: see ChunkPartial.)
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
        // Behind all heads of the tokens before, and these tokens' heads before.
        const int first = slot * params.partial_rows + tile.first_token * params.num_heads +
                          tile.first_head * tile.tokens(params, params.query_len);
        out = params.out_partial + static_cast<int64_t>(first) * kHeadDimV;  // there may be gigabytes
        weight_sums = params.weight_sums + first;
    }

    __device__ int octet_rows(int octet) const { return min(kOctetRows, rows - octet * kOctetRows); }
    // From a group of the octet to the next one.
    __device__ int group_stride(int octet) const { return octet_rows(octet) * kGroupColumns; }
    __device__ float* group(int octet, int group) const {
        return out + octet * kOctetRows * kHeadDimV + group * group_stride(octet);
    }
    template <typename Vector>
    __device__ Vector* further(Vector* at, int octet, int groups) const {
        return ptx::further(at,
                            groups * group_stride(octet) / static_cast<int>(sizeof(Vector) / sizeof(float)));
    }
};

// A tile's partial of a chunk: each has a place of its own for its tile's rows, of whole octets, so that the
// compiler knows all distances.
struct ChunkPartial {
    static constexpr int kGroupFloats = kOctetRows * kGroupColumns;

    float* out;
    float2* weight_sums;

    // In a sequence's or a part's first slot; chunks further there.
    __device__ ChunkPartial(const DecodeParams& params, int first_slot, int chunk = 0) {
        const int tile = params.first_row_tile + blockIdx.x;
        const int first = ((first_slot + chunk) * params.num_row_tiles + tile) * params.partial_rows;
        out = params.out_partial + static_cast<int64_t>(first) * kHeadDimV;  // there may be gigabytes
        weight_sums = params.weight_sums + first;
    }
    // From a row of one chunk to that of the next one.
    __device__ static int rows_to_next(const DecodeParams& params) {
        return params.num_row_tiles * params.partial_rows;
    }

    __device__ float* group(int octet, int group) const {
        return out + (octet * kGroups + group) * kGroupFloats;
    }
    template <typename Vector>
    __device__ Vector* further(Vector* at, int, int groups) const {
        return at + groups * kGroupFloats / static_cast<int>(sizeof(Vector) / sizeof(float));
    }
};

}  // namespace mla

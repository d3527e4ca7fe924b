// How the query rows of a sequence are cut into the tiles that thread blocks work on: what row_tiling.py
// specifies. Host code without CUDA, so that a test can hold both together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>

namespace mla {

constexpr int kTileRows = 64;  // query rows a thread block works on, at most

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

struct RowTiling {
    int heads_per_group;  // h_q / h_kv
    int heads_per_tile = 0;
    int tokens_per_tile = 0;
    int tiles_per_token = 0;  // that the heads of a tile's tokens take
    int64_t num_row_tiles;    // over all KV heads

    // As few tiles as can be; of these with the most heads, then the most tokens.
    RowTiling(int64_t heads, int64_t num_kv_heads, int64_t max_query_len)
        : heads_per_group(static_cast<int>(heads / num_kv_heads)) {
        std::tuple<int64_t, int, int> least{INT64_MAX, 0, 0};
        for (int tokens = 1; tokens <= std::min<int64_t>(kTileRows, max_query_len); ++tokens) {
            const int of_token = static_cast<int>(ceil_div(heads_per_group, kTileRows / tokens));
            const int of_heads = static_cast<int>(ceil_div(heads_per_group, of_token));
            const std::tuple cost{of_token * ceil_div(max_query_len, tokens), -of_heads, -tokens};
            if (cost >= least) continue;
            least = cost;
            heads_per_tile = of_heads, tokens_per_tile = tokens, tiles_per_token = of_token;
        }
        num_row_tiles = std::get<0>(least) * num_kv_heads;
    }

    int rows_per_tile() const { return heads_per_tile * tokens_per_tile; }
    // Of the last of the tiles with the same tokens: what is left, one at least.
    int heads_of_last_tile() const { return heads_per_group - (tiles_per_token - 1) * heads_per_tile; }
    bool is_even() const { return heads_of_last_tile() == heads_per_tile; }
};

}  // namespace mla

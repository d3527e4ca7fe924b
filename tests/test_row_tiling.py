"""Query rows are cut into few tiles, and the kernels cut them as the specification does."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_flashmla_backend.flash_mla.layout import ceil_div
from vllm_flashmla_backend.flash_mla.row_tiling import row_tiling


@pytest.mark.parametrize("query_len", [1, 2, 3, 4])
def test_rows_are_in_as_few_tiles_as_they_fill(query_len):
    """Known failure 9: each tile reads all of the cache, whatever the heads."""
    for heads in range(1, 129):
        tiling = row_tiling(query_len, heads, 1)
        assert tiling.heads_per_tile * tiling.tokens_per_tile <= 64
        if (query_len, heads) not in ((3, 85), (3, 106)):
            assert tiling.num_row_tiles == ceil_div(heads * query_len, 64), heads


def test_kernels_cut_rows_into_the_same_tiles(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no C++ compiler")
    header = Path(__file__).parents[1] / "csrc" / "row_tiling.h"
    (tmp_path / "print.cpp").write_text(f'''
        #include "{header}"
        #include <cstdio>
        int main() {{
            for (int q = 1; q <= 70; ++q)
                for (int group = 1; group <= 128; ++group)
                    for (int kv : {{1, 3}}) {{
                        const mla::RowTiling it(group * kv, kv, q);
                        if (it.heads_of_last_tile() < 1 || it.heads_of_last_tile() > it.heads_per_tile)
                            return 1;
                        std::printf("%d %d %d %ld\\n", it.heads_per_tile, it.tokens_per_tile,
                                    it.tiles_per_token, long(it.num_row_tiles));
                    }}
        }}''')
    program = tmp_path / "print"
    command = [compiler, "-std=c++20", "-Wall", "-Werror", "-O1", program.with_suffix(".cpp"), "-o", program]
    subprocess.run(command, check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    shapes = itertools.product(range(1, 71), range(1, 129), (1, 3))
    want = [" ".join(map(str, row_tiling(q, group * kv, kv))) for q, group, kv in shapes]
    assert printed == want

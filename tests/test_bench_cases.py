"""The cases of `vllm-flashmla bench`: which they are, what they hold, and how they are written."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from test_bench_report import row

from vllm_flashmla_backend.bench import cases
from vllm_flashmla_backend.bench.cases import ALSO, REGIMES, TABLE, Case
from vllm_flashmla_backend.cli import main


def test_cases_are_the_24_of_the_targets():
    """b, s_q, s_k, h_q of the table; its first twelve have lengths that vary."""
    normal = [(128, 1, s_k, 128) for s_k in (4096, 16384, 32768)]
    normal += [(128, 2, s_k, 128) for s_k in (4096, 16384, 32768)]
    normal += [(128, 1, s_k, h_q) for h_q in (16, 32, 64) for s_k in (4096, 16384)]
    fixed = [
        (b, 1, s_k, h_q)
        for b, s_k in ((1, 8192), (1, 131072), (4, 8192), (16, 8192), (32, 1024), (64, 512))
        for h_q in (16, 128)
    ]
    assert len(TABLE) == 24
    shapes = {(case.b, case.s_q, case.s_k, case.h_q): case.lengths for case in TABLE}
    assert shapes == dict.fromkeys(normal, "normal") | dict.fromkeys(fixed, "fixed")
    assert {case.dtype for case in TABLE} == {"bfloat16"}


@pytest.mark.parametrize(
    "name, belongs, count, must, goal",
    [
        ("compute bound", lambda c: c.b == 128 and c.h_q * c.s_q >= 128 and c.s_k >= 16384, 4, 1.00, 1.08),
        ("memory bound", lambda c: c.b == 128 and c.h_q < 128 and c.s_k == 16384, 3, 1.05, 1.20),
        ("middle", lambda c: c.b == 128 and c.s_k == 4096, 5, 1.05, 1.20),
        ("latency", lambda c: c.b * c.s_k <= 32768, 8, 1.25, 1.50),
        ("few long", lambda c: c.b * c.s_k == 131072, 4, 1.05, 1.20),
    ],
)
def test_each_regime_holds_the_rows_that_its_targets_are_for(name, belongs, count, must, goal):
    regime = REGIMES[name]
    assert set(regime.cases) == {case for case in TABLE if belongs(case)}
    assert (len(regime.cases), regime.must, regime.goal) == (count, must, goal)


def test_extra_cases_cover_what_is_also_reported():
    extra = REGIMES[ALSO].cases
    assert {(case.s_q, case.h_q) for case in extra if case.s_q > 1} == {(3, 16), (3, 128), (4, 16), (4, 128)}
    assert {8, 20, 40} <= {case.h_q for case in extra}
    assert "float16" in {case.dtype for case in extra}
    assert {(256, 1024), (8, 131072)} <= {(case.b, case.s_k) for case in extra}
    assert not set(extra) & set(TABLE)
    (skewed,) = (case for case in extra if case.lengths == "one long" and case.h_q == 16)
    assert sorted(Counter(skewed.cache_seqlens()).items()) == [(1024, 31), (51200, 1)]


def test_lengths_are_the_same_in_every_run_and_at_least_s_q():
    case = Case(128, 2, 4096, 128, "normal")
    lengths = case.cache_seqlens()
    assert lengths == case.cache_seqlens()
    assert min(lengths) >= case.s_q
    assert abs(sum(lengths) / 128 / 4096 - 1) < 0.15
    assert len(set(lengths)) > 100


def test_random_cases_are_of_all_sizes_and_for_every_kernel():
    drawn = cases.ROWS["random"]
    assert len(set(drawn)) == len(drawn) == 200
    for sizes, limits in (
        ([case.s_q * case.h_q for case in drawn], (0, 16, 32, 64, 512)),
        ([case.b * case.s_k for case in drawn], (0, 2**12, 2**14, 2**17, 2**19)),
    ):
        for low, high in pairwise(limits):
            assert sum(low < size <= high for size in sizes) >= 20, (low, high)


def test_flops_and_bytes_are_those_of_the_formulas():
    assert Case(1, 1, 8192, 16).flops() == 2 * 16 * 1 * 8192 * 1088
    assert Case(4, 2, 100, 128).bytes_moved() == 400 * 1152 + 4 * 2 * 128 * 2176
    made = row(Case(1, 1, 8192, 16), "ours", 10.0)
    assert (made["tflops"], made["gbps"]) == (28.5, 947.2)


@pytest.mark.parametrize("case", cases.ROWS["all"], ids=str)
def test_a_case_is_parsed_from_its_words(case):
    assert Case.parse(str(case)) == case
    assert Case.parse(str(case).replace(" s_q=1", " ")) == case


def test_a_cases_words_may_come_in_any_order():
    assert Case.parse("one long h=16 float16 s_k=900 b=4 s_q=2") == Case(4, 2, 900, 16, "one long", "float16")


@pytest.mark.parametrize(
    "words, message",
    [
        ("b=32 h=16", "--case: no s_k= in 'b=32 h=16', expected a case as in 'b=32 s_k=4096 h=16'"),
        ("b=32 s_k=4096 h=16 random", "'random' in 'b=32 s_k=4096 h=16 random', expected"),
        ("b=32 s_k=4096 h=abc", "'h=abc' in 'b=32 s_k=4096 h=abc', expected"),
        (
            "b=32 s_k=4096 h=16 b=64",
            "'b=64', the second of its kind, in 'b=32 s_k=4096 h=16 b=64', expected",
        ),
        ("b=32 s_k=4096 h=16 one", "lengths are fixed, normal, one long"),
        ("b=0 s_k=4096 h=16", "b=0 in 'b=0 s_k=4096 h=16', expected 1 to 65,536"),
        ("b=1 s_k=2147483648 h=16", "s_k=2147483648 in"),
        ("b=60000 s_k=40000000 h=16", "expected up to 2,147,483,647 in all"),
        ("b=2 s_k=42949673 h=16 one long", "expected up to 2,147,483,647 in all"),
        ("b=1 s_k=8 h=16 one long", "b=1 in 'b=1 s_k=8 h=16 one long', expected another sequence"),
        ("b=1 s_k=٤٠٩٦ h=16", "expected a case as in"),
        ("b=1 s_q=9 s_k=8 h=16", "s_q=9 in 'b=1 s_q=9 s_k=8 h=16', expected 1 to 8, its s_k"),
        ("b=1 s_k=8 h=129", "expected 1 to 128"),
    ],
)
def test_wrong_case_says_what_is_expected(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--case", words])
    said = " ".join(capsys.readouterr().err.split())
    assert "argument --case: " in said and f"{words!r}, expected" in said
    assert message in said

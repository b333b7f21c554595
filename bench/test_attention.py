"""pytest-benchmark tests of the family `attention` (see `bench/cases_attention.py`)."""

from bench._pytest import family, run


@family("attention")
def test_attention(case, variant, benchmark):
    run(case, variant, benchmark)

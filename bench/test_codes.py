"""pytest-benchmark tests of the family `codes` (see `bench/cases_codes.py`)."""

from bench._pytest import family, run


@family("codes")
def test_codes(case, variant, benchmark):
    run(case, variant, benchmark)

"""pytest-benchmark tests of the family `norm` (see `bench/cases_norm.py`)."""

from bench._pytest import family, run


@family("norm")
def test_norm(case, variant, benchmark):
    run(case, variant, benchmark)

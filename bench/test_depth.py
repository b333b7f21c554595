"""pytest-benchmark tests of the family `depth` (see `bench/cases_depth.py`)."""

from bench._pytest import family, run


@family("depth")
def test_depth(case, variant, benchmark):
    run(case, variant, benchmark)

"""pytest-benchmark tests of the family `sample` (see `bench/cases_sample.py`)."""

from bench._pytest import family, run


@family("sample")
def test_sample(case, variant, benchmark):
    run(case, variant, benchmark)

"""pytest-benchmark tests of VAR (see `bench/cases_var.py`)."""

from bench._pytest import family, run


@family("var")
def test_var(case, variant, benchmark):
    run(case, variant, benchmark)

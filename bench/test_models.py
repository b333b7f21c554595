"""pytest-benchmark tests of whole models (see `bench/cases_models.py`)."""

from bench._pytest import family, run


@family("models")
def test_models(case, variant, benchmark):
    run(case, variant, benchmark)

"""pytest-benchmark tests of RQ-Transformer (see `bench/cases_rqtransformer.py`)."""

from bench._pytest import family, run


@family("rqtransformer")
def test_rqtransformer(case, variant, benchmark):
    run(case, variant, benchmark)

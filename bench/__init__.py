"""Benchmarks: one timer, one results schema, one scoreboard, and a file of cases per family.

    python -m bench list                       the families and their cases
    python -m bench codes [--case PATTERN]     measure a family, write bench/results/<family>-<device>-<commit>.json
    python -m bench codes attention --warm 12  compile for the cases of two families, in twelve processes (see below)
    python -m bench scoreboard                 docs/scoreboard.md and its plots from the files in bench/results
    pytest bench/ --benchmark-only             the same cases and the same timer as a pytest-benchmark table

Run from the root of a checkout. On a GPU the cases have the shapes of published models and the figures are GPU time; on
a CPU they are small and the figures are wall time.

A first run mostly waits for compilers, its peers' above all. The same command with `--warm JOBS` runs every case once,
untimed, in that many processes that share the caches on disk, so that the timed run finds there what it needs; it says
what failed (exit status 1 if ours did) and writes no results.

To add a case, add a row to the family's table in `bench/cases_<family>.py`. To add a family, write two files:

1. `bench/cases_<family>.py` with `cases(device) -> list[Case]` (see `bench._case.Case`; `bench/cases_codes.py` is the
   example): what the least traffic is, how fresh inputs are made, ours and the peers, what the outputs must equal.
2. `bench/test_<family>.py`, three lines as in `bench/test_codes.py`.

The commands, the scoreboard and the plots find them by their names. A peer that is not installed is left out, one that
fails is reported with its error, one that wins is printed in bold.
"""

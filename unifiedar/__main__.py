"""`python -m unifiedar`: the command."""

from unifiedar.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

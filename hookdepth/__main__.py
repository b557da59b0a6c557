"""`python -m hookdepth` is the `hookdepth` command."""

from hookdepth.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

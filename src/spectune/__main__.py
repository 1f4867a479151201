"""`python -m spectune` is the same program as the `spectune` command."""

from spectune.cli.app import main

if __name__ == "__main__":
    main()

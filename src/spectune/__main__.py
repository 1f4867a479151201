"""`python -m spectune` is the same program as the `spectune` command."""

from spectune.apps.cli import main

if __name__ == "__main__":
    main()

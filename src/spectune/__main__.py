"""Run the `spectune` command as `python -m spectune`."""

from spectune.cli.app import main

if __name__ == "__main__":
    main()

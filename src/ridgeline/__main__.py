"""``python -m ridgeline`` is the same program as ``ridgeline``."""

from ridgeline.cli.main import main

if __name__ == "__main__":
    main()

"""`gradsift` and `python -m gradsift`: the command line, which may be interrupted while it is still being read."""

import gc
import sys


def main() -> None:
    """Entry point."""
    gc.disable()  # until the work begins: what is imported is no garbage
    try:
        from gradsift.base.interruption import heed_sigterm

        heed_sigterm()
        from gradsift.cli import app

        app()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was begun", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

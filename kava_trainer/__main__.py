"""`python -m kava_trainer COMMAND ...`, see `cli`."""

import sys

from .cli import NOTHING_TO_SAVE, main, show_traceback

if __name__ == "__main__":
    sys.excepthook = show_traceback
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are imported
        print(NOTHING_TO_SAVE, file=sys.stderr)
        sys.exit(130)

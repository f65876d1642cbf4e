"""``python -m qubes_storage``, or ``python -I`` and this directory, is ``qubes-storage``."""

import os
import sys

if not __package__:  # this directory was run: the package lies beside it, and not in it
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if path != here)]

from qubes_storage.cli import main

if __name__ == "__main__":
    sys.exit(main())

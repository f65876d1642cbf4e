"""``python -m qubes_storage`` is the command ``qubes-storage``."""

import sys

from qubes_storage.cli import main

if __name__ == "__main__":
    sys.exit(main())

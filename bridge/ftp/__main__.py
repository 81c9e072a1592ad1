"""`python -m bridge.ftp`."""

import sys

from bridge.ftp.command import main

if __name__ == "__main__":
    sys.exit(main())

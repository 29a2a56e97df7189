"""`python -m mmcache.testing.simulator`: see command.py."""

import sys

from mmcache.testing.simulator.command import main

if __name__ == "__main__":
    sys.exit(main())

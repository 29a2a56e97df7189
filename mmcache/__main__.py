"""`python -m mmcache`: the command line."""

from mmcache.cli import main

if __name__ == "__main__":
    main()

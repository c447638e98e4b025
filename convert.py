"""`python convert.py` does what `hydra-mlx convert` does."""

import sys

from hydra_mlx.convert import main

if __name__ == "__main__":
    sys.exit(main())

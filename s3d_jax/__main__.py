"""`python -m s3d_jax` is the command `s3d`."""

import sys

from s3d_jax.commands.main import main

sys.exit(main())

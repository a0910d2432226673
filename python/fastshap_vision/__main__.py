"""python -m fastshap_vision: the command line."""

import sys

from .cli import main

sys.exit(main())

"""python -m fastshap_vision: the command line."""

import sys

from .cli.main import main

sys.exit(main())

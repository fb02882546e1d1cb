"""``python -m onlinequant_backend.cli``."""

import sys

from .commands import main

sys.exit(main())

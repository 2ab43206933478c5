"""`python -m edge_teacher` is `edge-teacher`."""

import sys

from edge_teacher.cli import main

sys.exit(main())

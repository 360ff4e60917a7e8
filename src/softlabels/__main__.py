"""`python -m softlabels`: the same as the command `softlabels`."""

import sys

from softlabels.cli import main

sys.exit(main())

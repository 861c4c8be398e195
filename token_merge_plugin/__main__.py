"""`python -m token_merge_plugin` is `token-merge`."""

import sys

from token_merge_plugin.cli import main

sys.exit(main())

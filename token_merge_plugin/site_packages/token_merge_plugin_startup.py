"""Imported by token_merge_plugin.pth as Python starts, where the environment asks for token merging.

This folder's files are installed into the root of site-packages: importing a part of the package would import timm and
torch, which the program that starts may not need. wrapt is not imported before timm is, either: while .pth files are
read, sys.path is not complete (in a virtual environment that sees the system's packages, these come later).
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec


class TimmFinder:
    """Sees the first import of timm coming, and registers what is to be done after it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        import wrapt

        wrapt.register_post_import_hook("token_merge_plugin.pipelines:install_from_environment", "timm")
        sys.meta_path.remove(self)
        return find_spec(name)


sys.meta_path.insert(0, TimmFinder())

"""The method, without timm: scoring, matching, merging and restoring as tensor functions, and what a pass carries."""

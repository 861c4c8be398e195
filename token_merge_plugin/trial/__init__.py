"""Is it worth it? What merging saves and costs on one model and one set of images, and which schedule suits them."""

from token_merge_plugin.trial.calibration import calibrate
from token_merge_plugin.trial.exporting import export
from token_merge_plugin.trial.images import Tensors
from token_merge_plugin.trial.judging import verdict
from token_merge_plugin.trial.run import evaluate, run_trial
from token_merge_plugin.trial.summaries import summary

__all__ = ["Tensors", "calibrate", "evaluate", "export", "run_trial", "summary", "verdict"]

"""A lean trainer for Early Stopping Rollout distillation: `python -m esr_train`."""

"""The update step, on plain torch or on DeepSpeed."""

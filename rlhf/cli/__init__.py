"""The `rlhf` command, the outermost layer."""

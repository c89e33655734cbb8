"""Rollout engines: `build.build_generator` makes the one that a run file names. Importing this package loads none."""

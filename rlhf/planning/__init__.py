"""What a run will take before it is started: batches, memory and time, as pure functions of the run file, the cluster
file and a model's config.json. Imports neither torch nor ray."""

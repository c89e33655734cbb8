"""From data sets on disk or on the hub to prompts and collated micro-batches."""

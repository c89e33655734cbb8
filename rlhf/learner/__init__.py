"""The policy's owner: plans micro-batches, computes losses, takes optimizer steps, publishes and saves."""

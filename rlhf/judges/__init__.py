"""Whatever fills columns of a group: reward functions and the reference model."""

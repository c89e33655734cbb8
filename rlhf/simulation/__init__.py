"""A run in virtual time: the real loop, source and admission over engines, judges and a learner that only take time."""

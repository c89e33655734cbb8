"""Loading of models, low-rank adapters, and the small models that need no hub."""

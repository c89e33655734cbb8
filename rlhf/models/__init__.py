"""Models: loading, LoRA, the tiny offline model, SmolLM2 without a hub."""

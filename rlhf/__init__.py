"""ray-rlhf: online and offline alignment of language models through one loop and one experience buffer."""

__version__ = "0.1.0"

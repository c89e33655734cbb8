"""The Ray side: each plain class of `rlhf` hosted by an actor. The only package that imports ray."""

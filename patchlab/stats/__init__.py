"""Statistics: bootstrap and agreement."""

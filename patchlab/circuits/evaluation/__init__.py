"""Running circuits, and measuring what they explain."""

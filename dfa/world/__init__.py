"""A world of our own: procedural scenes with exact masks, and the tiny CLIP trained on their captions."""

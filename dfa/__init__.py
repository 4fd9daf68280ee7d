"""Weakly supervised semantic segmentation as a distributed system: image-level labels in, models and masks out."""

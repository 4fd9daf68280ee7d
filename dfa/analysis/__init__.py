"""Spectral analysis over data sets: pairs of predictions and ground truth, read, summed in parts, added up (METHOD 3)."""

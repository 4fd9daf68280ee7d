"""Spectral analysis of segmentation (Chen, Chiu, Wu 2021; METHOD 3): what each frequency of the labels and of the features is worth."""

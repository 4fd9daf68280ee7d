"""Pseudo-labels: class activation maps -> refined pixel labels."""

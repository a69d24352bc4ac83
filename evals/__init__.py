"""Judges frozen features: k-NN today."""

"""Measures the rooms from outside; returns results, prints nothing."""

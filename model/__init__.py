"""Encoder, decoder, heads, teachers, collapse avoidance, and one file per method."""

"""A data set on disk: writers, index, readers and checks.  numpy, not torch."""

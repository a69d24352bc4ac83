"""Compares methods: runs of several recipes, side by side, on equal budgets."""

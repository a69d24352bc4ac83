"""Recipes as YAML files; packaged so that an installed Maestri has them too."""

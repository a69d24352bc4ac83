"""Commands of ``maestri shards``, one a module."""

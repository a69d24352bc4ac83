"""A ShardSet turned into batches on the device: order, views, masks, executors, the loader, ``Batch``."""

"""Connectors: how inference engines keep their tensors in mmcache. One package per engine; none imports another.

`paged.py` is shared: paged KV memory to and from the tensors that are stored. An engine's package is imported by that
engine alone, so mmcache itself installs and runs without any of them.
"""

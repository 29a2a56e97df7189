"""Shipped helpers to test against: a real server process, and faults planted in a real store."""

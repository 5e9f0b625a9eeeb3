"""Thin faces: the names that users of other libraries know, over the same core."""

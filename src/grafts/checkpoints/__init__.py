"""Adapters on disk: the formats, and what files and directories need whatever the format."""

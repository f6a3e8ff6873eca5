"""Processes and servers."""

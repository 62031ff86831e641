"""Concepts without labels: what activates a channel most, in clusters."""

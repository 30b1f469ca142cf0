"""Metrics for videos, alpha and meshes."""

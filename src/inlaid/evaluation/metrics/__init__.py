"""Metrics of videos, alpha and meshes."""

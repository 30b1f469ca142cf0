"""Transparency: how a family carries alpha (opaque, joint, merged)."""

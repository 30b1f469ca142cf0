"""Bytes on disk to arrays and back: video, images, arrays, RGBA, meshes. Knows no recipe."""

"""Alpha support of the model families: opaque, joint and merged."""

"""Before training: checks, memory and time estimates, new recipes."""

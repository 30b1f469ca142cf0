"""Generation of videos and scenes from a run."""

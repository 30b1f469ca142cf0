"""Generation of videos and 3D scenes with the trained weights of a run."""

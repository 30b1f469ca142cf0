"""Environment of a run: devices, processes, run folder, optional packages."""

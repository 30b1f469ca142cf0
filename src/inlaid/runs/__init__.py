"""Where a run happens and what it leaves: devices, processes, run folder, optional packages."""

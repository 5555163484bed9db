"""The process and its machine: devices, signals, progress, other processes, files and locks."""

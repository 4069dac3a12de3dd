"""The plumbing of training: settings and flags, optimizer and average, processes, checkpoints, log, own photos."""

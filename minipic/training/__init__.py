"""The plumbing of training: settings, flags, optimizer, processes, and the files of a run."""

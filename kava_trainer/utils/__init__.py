"""What knows nothing of distillation: files, signals, processes, the terminal."""

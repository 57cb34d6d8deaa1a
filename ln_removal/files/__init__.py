"""What lies on disk and beyond: run directories, atomic writes, the metrics log, signals, the Hub's client."""

"""What a run tells: counters, loggers, the live line, the report and the summary."""

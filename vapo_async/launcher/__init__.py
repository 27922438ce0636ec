"""Where the stages run: all in one process, or each in a Ray actor."""

"""How the learner's parameters reach the engines."""

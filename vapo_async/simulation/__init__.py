"""A discrete-event simulation of rollout workers and a learner around the real buffer."""

"""The learner: one batch becomes updates of policy and critic."""

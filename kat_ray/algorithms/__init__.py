"""How a step's rollouts become what the learner is to learn: one file for each algorithm, on the driver."""

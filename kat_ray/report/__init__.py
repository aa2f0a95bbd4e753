"""One page to look at: what a run did, where its rollouts agreed with the teacher, and what its rule cut."""

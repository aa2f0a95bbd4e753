"""The embedded task, its data, and the tiny student and teacher."""

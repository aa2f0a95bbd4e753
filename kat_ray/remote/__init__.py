"""A teacher behind HTTP, seen from the run: messages, tokens, retries, bounds, the client, what servers say."""

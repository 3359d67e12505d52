"""What the router adds to LiteLLM: keys with budgets, a check of answers with tools, an audit log."""

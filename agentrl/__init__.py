"""agentrl: reinforcement learning of language agents that use tools, in JAX."""

"""What a run keeps of its past and trains on again: one module a memory. Needs no accelerator, no jax."""

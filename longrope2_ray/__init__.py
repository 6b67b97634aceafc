"""LongRoPE2 on Ray: search the RoPE factors that extend a model's context window."""

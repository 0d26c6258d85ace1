"""The HTTP server: OpenAI's routes over one engine. Needs the extra `serve`; `hybrid-jax serve` starts it."""

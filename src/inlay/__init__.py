"""inlay teaches diffusion transformers a new subject."""

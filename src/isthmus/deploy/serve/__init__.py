"""A network as a service: pictures come over HTTP, and their classes go back."""

"""How people reach it: Ray Serve application, OpenAI-compatible API and command line."""

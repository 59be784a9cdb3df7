"""The server: OpenAI's and Ollama's interfaces over HTTP, on the engine; safe by default."""

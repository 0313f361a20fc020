"""Scorers that ask a server: http.py one of rewards/serve.py or of one's own, chat.py one with an OpenAI-compatible chat endpoint."""

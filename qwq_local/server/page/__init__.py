"""The chat page that the server has under `/` where the extra [web] is installed."""

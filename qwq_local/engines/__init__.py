"""The engines behind the Protocol of qwq_local.engine."""

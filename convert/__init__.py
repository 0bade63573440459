"""A Qwen2 checkpoint in, quantized files out."""

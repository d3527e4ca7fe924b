"""The vLLM side: what vLLM asks of an attention backend, answered with `flash_mla`."""

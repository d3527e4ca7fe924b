"""The endurance run behind `vllm-flashmla soak`: what is asked, how it is sent, and what came of it."""

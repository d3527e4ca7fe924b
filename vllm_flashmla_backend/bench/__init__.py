"""The benchmark behind `vllm-flashmla bench`: what is measured, against whom, how, and how it is shown."""

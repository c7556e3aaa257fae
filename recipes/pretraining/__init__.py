"""Pre-training LLaMAs from scratch: Fira beside GaLore, APOLLO, LoRA, ReLoRA and full AdamW."""

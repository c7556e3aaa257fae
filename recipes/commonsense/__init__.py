"""Fine-tuning on the commonsense suite: Fira beside LoRA, GaLore and full AdamW."""

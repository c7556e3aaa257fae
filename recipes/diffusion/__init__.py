"""Fira beside LoRA, GaLore and AdamW on small diffusion models of handwritten digits."""

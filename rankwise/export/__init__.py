"""Anyone's finished PEFT LoRA adapter: read, compressed, written again."""

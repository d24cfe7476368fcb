"""Single-tenant workers: they train no LoRA, but the base's own weights, or what another method of the PEFT
library adds to it."""

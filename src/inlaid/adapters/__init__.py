"""LoRA, DoRA, LoKr and LoHa adapters: functions that attach, save, read, merge and convert adapters."""

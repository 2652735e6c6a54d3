"""The prefix artifact: tensors and conventions, folders, PEFT adapters, composition, inspection and the hub."""

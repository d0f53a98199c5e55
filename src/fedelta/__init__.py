"""fedelta: federated fine-tuning of language models with LoRA, exactly."""

__version__ = "0.2.0"

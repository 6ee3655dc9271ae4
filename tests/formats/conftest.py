from quantized_checkpoints import float_model, quantized

__all__ = ["float_model", "quantized"]

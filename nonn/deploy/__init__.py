"""What a network becomes on a device, and what it costs there: ONNX, int8, memory, operations."""

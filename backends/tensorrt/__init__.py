"""TensorRT: the portable ONNX graph, built into an engine for one GPU, and run with the cache in place."""

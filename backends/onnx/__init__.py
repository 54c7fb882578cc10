"""ONNX graphs for onnxruntime-genai and plain ONNX Runtime, and the portable graph that TensorRT builds from."""

"""Core ML: the forward pass as a MIL program in a `.mlpackage` for iOS 18 / macOS 15, and an interpreter of those."""

"""Quality against size: every level of ours beside the native quantizers of other tools, scored in one way.

`variants` names what can be asked for and `study` runs it. A variant is made, decoded from the files that its tool
wrote, and scored in a process of its own (`worker`): one float32 forward of the dequantized weights for all of them.
"""

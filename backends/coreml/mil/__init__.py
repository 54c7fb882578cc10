"""An interpreter of saved Core ML programs (MIL protobufs with their weight file) in NumPy.

`program` reads functions, `weights` the weight file, `ops` holds the operations, `machine` runs them.
"""

"""Where the memory goes: samples of devices and models, and the peak of each node of a prompt.

Nothing here runs until somebody looks: a client's lease (`routes`) or a monitor node in a running prompt.
"""

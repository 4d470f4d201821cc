"""Everything that a person or a sensor can ask for, in five stages by what they do.

`read`, `fetch`, `derive`, `prove` and `operate` are the folders, and each imports only those before
it. A flow is a class or a function that takes the tools it uses; `context.Context.bind` makes one.
"""

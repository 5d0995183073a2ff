"""What can be chosen, and what a choice means: the schema, composing and checking it, a run's identity and its command.

It imports the modules at the top of the package, and no other package of tiedlora.
"""

"""Stand-ins for the programs that read exported files, written from descriptions of their loaders.

Nothing here imports the exporters of inlaid: a stand-in applies the program's own lookup rules to a file and
to the weights of its own network, and reports what it did not use.
"""

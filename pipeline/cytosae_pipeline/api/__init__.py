"""The verbs as functions: objects in, objects out, with the options of the command line under their own names."""

"""The processes of a job: collectives, start and end, stages, signals, and what a process measures of itself.

Everything works for one process too. It knows nothing of what is computed.
"""

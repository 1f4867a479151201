"""The queue of the Studio: jobs are processes of the command line, which survive the server.

records: the files of a job's folder that the Studio writes.
arguments: from the fields of a command's record to the arguments of the command line.
process: start a process that continues when the server ends, tell whether it still runs, end it.
reading: the events and the log of a job, from any position.
queue: the jobs, their states, and the one that runs.
api: the routes below /api/jobs.
"""

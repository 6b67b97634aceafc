"""What the exit codes of ``longrope2`` mean."""

SUCCESS = 0
# The run could not go on; the same command resumes it.
STOPPED = 1
# The user's mistake: a wrong option, recipe or path. argparse uses the same code.
USAGE_ERROR = 2
# A newer driver has taken the run over; the cluster's job must not be submitted again.
FENCED = 3
INTERRUPTED = 130

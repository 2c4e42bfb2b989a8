"""One file for each command, each with `run(arguments) -> exit code`; imported only when the command is given."""

"""The ``maestri`` command: one thin file that finds the room a subcommand lives in."""

"""The command: `python -m bridge.ftp`, and nothing that a program would need.

It reads options (options.py, parts/), makes one server of them (application.py), and runs it (command.py):
signals, privileges, systemd, start-up lines. Each file in parts/ has the options of one thing and puts its
work, which lies in the other rooms, into the application. A wrong option is one line and exit code 2.

It never does what a program could not do with the same classes. Begin with command.py.

Public names: `main(argv)`.
"""

from bridge.ftp.command import main

__all__ = ["main"]

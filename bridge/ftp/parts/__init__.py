"""A file for each part of the command: `add_options(parser)` and `configure(application)`.

`configure` checks the options (UsageError) and changes the application before it is bound; the work itself is
done in the rooms tls, proxy, users, logs, web and workers. The order of the parts is `command.PARTS`.
"""
